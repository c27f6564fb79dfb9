"""What the stages of APT's own expert are; what holds for every architecture is in ``test_architectures.py``."""

from __future__ import annotations

import pytest
import torch

from apt.model.experts.apt import ActionExpert
from apt.model.experts.base import Modality
from apt.model.experts.config import ExpertConfig
from apt.model.vla import VLA, draw_camera_keep
from tests.model.helpers import build, fixed_noise, make_batch


@pytest.fixture(scope="module")
def stage0() -> VLA:
    return build(0)


def test_leaving_language_out_equals_masking_it(stage0):
    """Stage 1 never shows the prompt to the VLM; showing it and masking its tokens gives the same."""
    masked = build(0)
    masked.vlm.vision_only = False
    masked.load_state_dict(stage0.state_dict())
    batch, lean = (
        make_batch(model.vlm, ["pick up the cereal box and put it into the small bin", "no"])
        for model in (masked, stage0)
    )
    features = masked.vlm(batch.observation)
    assert (features.modality == Modality.LANGUAGE).any()
    assert not (stage0.vlm(lean.observation).modality == Modality.LANGUAGE).any()
    torch.testing.assert_close(
        masked.predict(batch.observation, fixed_noise(batch)),
        stage0.predict(lean.observation, fixed_noise(lean)),
        atol=2e-4,
        rtol=1e-4,
    )


@pytest.mark.parametrize("step_embedding", [False, True])
def test_stage1_commutes_with_permutations_of_future_steps_unless_they_are_numbered(step_embedding):
    model = build(0, action_step_embedding=step_embedding)
    batch = make_batch(model.vlm, ["go", "go"])
    noise, order = fixed_noise(batch), torch.randperm(8, generator=torch.Generator().manual_seed(3))
    straight = model.predict(batch.observation, noise)[:, order]
    permuted = model.predict(batch.observation, noise[:, :, order])
    difference = (straight - permuted).abs().max()
    assert difference > 1e-3 if step_embedding else difference < 1e-4


@pytest.mark.parametrize(
    "arch, stage", [("apt", 1), ("token_insertion", 1), ("pi", 0), ("pi", 1), ("gr00t", 0), ("gr00t", 1)]
)
def test_steps_are_told_apart_by_rotary_positions_where_there_are_any(arch, stage):
    model = build(stage, arch=arch)
    batch = make_batch(model.vlm, ["go", "go"])
    noise, order = fixed_noise(batch), torch.arange(7, -1, -1)
    straight = model.predict(batch.observation, noise)[:, order]
    assert (straight - model.predict(batch.observation, noise[:, :, order])).abs().max() > 1e-4


@pytest.mark.parametrize("stage", [0, 1])
def test_parameters_without_a_path_to_the_output_do_not_train(stage):
    model = build(stage).train()
    model(make_batch(model.vlm, ["go", "go"])).total.backward()
    frozen = {name for name, p in model.expert.named_parameters() if not p.requires_grad}
    unused_features = {0: {0, 2, 3}, 1: {3}}[stage]
    wanted = {f"gates.{i}" for i in unused_features}
    wanted |= {f"proj_vl.{i}.{part}" for i in unused_features for part in ("weight", "bias")}
    assert frozen == wanted | {f"blocks.{len(model.expert.blocks) - 1}.norm2_vl.weight"}


def test_camera_view_dropout_hides_one_camera_and_never_the_last():
    mask = torch.tensor([[True, True, True], [False, True, False], [True, False, True]]).repeat(200, 1)
    keep = draw_camera_keep(mask, 1.0, torch.Generator().manual_seed(0))
    shown, left = mask.sum(1), (mask & keep).sum(1)
    assert (left == torch.where(shown >= 2, shown - 1, shown)).all()
    half = draw_camera_keep(mask, 0.5, torch.Generator().manual_seed(0))
    dropped = ((mask & half).sum(1) < shown)[shown >= 2].float().mean()
    assert 0.4 < dropped < 0.6


def test_an_odd_number_of_features_is_a_configuration_error():
    with pytest.raises(ValueError, match="must be even"):
        ActionExpert(ExpertConfig(width=64, heads=4, num_layers=3, input_dim=32))


def test_a_head_width_that_poses_do_not_fit_is_a_configuration_error():
    with pytest.raises(ValueError, match="multiple of 8"):
        ExpertConfig(width=48, heads=4, num_layers=4, input_dim=32)
