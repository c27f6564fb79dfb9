"""What makes the two stages: language masked in the first, every shared tensor carried into the second."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from apt.action_expert import ActionExpert
from apt.experts.base import Modality, TrainingDraws
from apt.policy_config import ExpertConfig, VLAConfig
from apt.pretrained import CheckpointMismatch
from apt.state_dict_adapter import expand_va
from apt.vla import VLA, robot_state
from tests.model.helpers import make_batch

SMALL = VLAConfig(model="tiny", vlm="tiny", vlm_layer_stride=1, num_future=8)


def build(stage: int, seed: int = 0, **changes) -> VLA:
    """A policy whose zero-initialised parts are filled, so that everything could reach the output."""
    torch.manual_seed(seed)
    model = VLA(dataclasses.replace(SMALL, train_stage=stage, **changes)).eval()
    with torch.no_grad():
        for parameter in model.expert.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def fixed_noise(batch, num_future: int = 8) -> torch.Tensor:
    arms = batch.observation.valid_ee.shape
    return torch.randn(*arms, num_future, 10, generator=torch.Generator().manual_seed(7))


PROMPTS = (["go", "go"], ["pick up the cereal box and put it into the small bin", "no"])


@pytest.fixture(scope="module")
def stage0() -> VLA:
    return build(0)


@pytest.fixture(scope="module")
def stage1() -> VLA:
    return build(1)


def predictions(model: VLA, **options) -> list[torch.Tensor]:
    batches = [make_batch(model.vlm, prompts, **options) for prompts in PROMPTS]
    return [model.predict(batch.observation, fixed_noise(batch), steps=5) for batch in batches]


@pytest.mark.parametrize("hidden", [(), [(0, 1)]])
def test_stage1_prediction_ignores_the_prompt_to_the_bit(stage0, hidden):
    first, second = predictions(stage0, hidden=hidden)
    assert torch.equal(first, second)


def test_stage2_prediction_follows_the_prompt(stage1):
    first, second = predictions(stage1)
    assert (first - second).abs().max() > 1e-4


def test_leaving_language_out_equals_masking_it(stage0):
    """Stage 1 never shows the prompt to the VLM; showing it and masking its tokens gives the same."""
    masked = build(0)
    masked.vlm.vision_only = False
    masked.load_state_dict(stage0.state_dict())
    batch, lean = (make_batch(model.vlm, list(PROMPTS[1])) for model in (masked, stage0))
    features = masked.vlm(batch.observation)
    assert (features.modality == Modality.LANGUAGE).any()
    assert not (stage0.vlm(lean.observation).modality == Modality.LANGUAGE).any()
    torch.testing.assert_close(
        masked.predict(batch.observation, fixed_noise(batch)),
        stage0.predict(lean.observation, fixed_noise(lean)),
        atol=2e-4,
        rtol=1e-4,
    )


def test_expansion_copies_every_shared_tensor_and_leaves_even_blocks_fresh(stage0):
    model = build(1, seed=1)
    before = {name: tensor.clone() for name, tensor in model.released_weights().items()}
    report = model.load_from_pretrain(stage0.released_weights(), load_from_va=True)
    after, source = model.released_weights(), expand_va(stage0.released_weights())
    assert not report.dropped and set(report.copied) == set(source)
    for name, tensor in after.items():
        assert torch.equal(tensor, source.get(name, before[name])), name
    assert {name.split("layers.")[1].split(".")[0] for name in report.fresh} == {"0", "2"}
    assert all("layers." in name for name in report.fresh)


def test_a_checkpoint_of_the_wrong_stage_is_refused_and_nothing_changes(stage0):
    model = build(1, seed=1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointMismatch, match="stage-0 checkpoint, a stage-1 one is wanted.*load-from-va"):
        model.load_from_pretrain(stage0.released_weights())
    with pytest.raises(CheckpointMismatch, match="stage-1 checkpoint, a stage-0 one is wanted"):
        model.load_from_pretrain(model.released_weights(), load_from_va=True)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_checkpoint_of_another_size_is_refused(stage0):
    model = build(0, model="small")
    with pytest.raises(CheckpointMismatch, match="differ in shape"):
        model.load_from_pretrain(stage0.released_weights())


@pytest.mark.parametrize("step_embedding", [False, True])
def test_stage1_commutes_with_permutations_of_future_steps_unless_they_are_numbered(step_embedding):
    model = build(0, action_step_embedding=step_embedding)
    batch = make_batch(model.vlm, ["go", "go"])
    noise, order = fixed_noise(batch), torch.randperm(8, generator=torch.Generator().manual_seed(3))
    straight = model.predict(batch.observation, noise)[:, order]
    permuted = model.predict(batch.observation, noise[:, :, order])
    difference = (straight - permuted).abs().max()
    assert difference > 1e-3 if step_embedding else difference < 1e-4


def test_stage2_knows_the_order_of_steps(stage1):
    batch = make_batch(stage1.vlm, ["go", "go"])
    noise, order = fixed_noise(batch), torch.arange(7, -1, -1)
    straight = stage1.predict(batch.observation, noise)[:, order]
    assert (straight - stage1.predict(batch.observation, noise[:, :, order])).abs().max() > 1e-4


def test_a_batch_does_not_mix_its_samples(stage1):
    batch = make_batch(stage1.vlm, ["pick up the can", "go"], seed=5)
    alone = make_batch(stage1.vlm, ["pick up the can"], seed=5)
    together = stage1.predict(batch.observation, fixed_noise(batch))[:1]
    torch.testing.assert_close(
        together, stage1.predict(alone.observation, fixed_noise(batch)[:1]), atol=2e-4, rtol=1e-4
    )


def test_an_invalid_arm_changes_nothing_for_the_valid_one(stage1):
    batch = make_batch(stage1.vlm, ["go", "go"], arms=2)
    batch.observation.valid_ee[:, 1] = False
    noise = fixed_noise(batch)
    before = stage1.predict(batch.observation, noise)[:, :, 0]
    batch.observation.history[:, :, 1, :3] += 1.0
    noise[:, 1] += 1.0
    assert torch.equal(before, stage1.predict(batch.observation, noise)[:, :, 0])


def test_prediction_moves_with_the_world(stage1):
    """Shift every pose by the same translation: predicted poses shift along, exactly what re-centring is for."""
    batch = make_batch(stage1.vlm, ["go", "stay"])
    noise, observation = fixed_noise(batch), batch.observation
    before = stage1.predict(observation, noise)
    shift = torch.tensor([0.5, -2.0, 1.0])
    for poses in (observation.world_from_cam, observation.world_from_ee, observation.world_from_ref):
        poses[..., :3, 3] += shift
    observation.history[..., [3, 7, 11]] += shift
    after = stage1.predict(observation, noise)
    after[..., [3, 7, 11]] -= shift
    torch.testing.assert_close(before, after, atol=5e-4, rtol=1e-3)


@pytest.mark.parametrize("mode", ["frozen", "lora", "full"])
def test_gradients_reach_what_the_vlm_mode_says(mode):
    model = build(1, vlm_mode=mode).train()
    model(make_batch(model.vlm, ["pick it up", "go"]), generator=torch.Generator().manual_seed(0)).total.backward()
    vlm = dict(model.vlm.qwen.named_parameters())
    reached = {name for name, p in vlm.items() if p.grad is not None}
    trained = {name for name, p in vlm.items() if p.requires_grad}
    assert reached == trained, "a parameter that trains must get a gradient: DDP waits for it"
    assert {name for name, p in model.expert.named_parameters() if p.requires_grad} == {
        name for name, p in model.expert.named_parameters() if p.grad is not None
    }
    if mode == "frozen":
        assert not trained
    elif mode == "lora":
        assert trained and all("lora_" in name for name in trained)
        projections = {name.split(".lora_")[0].rsplit(".", 1)[1] for name in trained}
        assert projections == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    else:
        unused = ("lm_head", "language_model.norm", "language_model.layers.3")
        assert all(name in trained for name in vlm if not any(part in name for part in unused))


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
    from apt.vla import draw_camera_keep

    mask = torch.tensor([[True, True, True], [False, True, False], [True, False, True]]).repeat(200, 1)
    keep = draw_camera_keep(mask, 1.0, torch.Generator().manual_seed(0))
    shown, left = mask.sum(1), (mask & keep).sum(1)
    assert (left == torch.where(shown >= 2, shown - 1, shown)).all()
    half = draw_camera_keep(mask, 0.5, torch.Generator().manual_seed(0))
    dropped = ((mask & half).sum(1) < shown)[shown >= 2].float().mean()
    assert 0.4 < dropped < 0.6


def test_a_dropped_camera_does_not_reach_the_prediction(stage1):
    batch = make_batch(stage1.vlm, ["go", "go"])
    keep = torch.tensor([[True, False], [True, True]])
    robot = robot_state(batch.observation)
    before = stage1.expert.predict(stage1.vlm(batch.observation, keep), robot, fixed_noise(batch))
    batch.observation.rgb[0, :, 1] = 0
    after = stage1.expert.predict(stage1.vlm(batch.observation, keep), robot, fixed_noise(batch))
    assert torch.equal(before[0], after[0])


def test_an_odd_number_of_features_is_a_configuration_error():
    with pytest.raises(ValueError, match="must be even"):
        ActionExpert(ExpertConfig(width=64, heads=4, num_layers=3, input_dim=32))


def test_a_head_width_that_poses_do_not_fit_is_a_configuration_error():
    with pytest.raises(ValueError, match="multiple of 8"):
        ExpertConfig(width=48, heads=4, num_layers=4, input_dim=32)


def test_same_generator_gives_the_same_loss(stage1):
    batch = make_batch(stage1.vlm, ["go", "go"])
    losses = [
        stage1(batch, torch.Generator().manual_seed(seed), pose_noise=True, camera_view_dropout=0.5).total.item()
        for seed in (1, 1, 2)
    ]
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.parametrize("mode", ["frozen", "full"])
def test_several_draws_per_observation_give_the_mean_gradient_of_as_many_passes(mode):
    """Draw by draw the same, hence the same in expectation, whatever K is."""
    model = build(1, vlm_mode=mode).train()
    batch = make_batch(model.vlm, ["go", "pick up the can"], arms=2)
    batch.observation.valid_ee[1, 1] = False
    robot = robot_state(batch.observation)
    draws = model.expert.draw(robot, noise_samples=3, generator=torch.Generator().manual_seed(0))

    def gradients(some: TrainingDraws) -> tuple[torch.Tensor, list[torch.Tensor]]:
        loss = model.expert(model.vlm(batch.observation), robot, batch.future, some).total
        return loss.detach(), torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])

    total, together = gradients(draws)
    singles = [
        gradients(dataclasses.replace(draws, noise=draws.noise[k::3], timestep=draws.timestep[k::3])) for k in range(3)
    ]
    torch.testing.assert_close(total, torch.stack([loss for loss, _ in singles]).mean(), atol=1e-4, rtol=1e-5)
    for gradient, *apart in zip(together, *(found for _, found in singles), strict=True):
        scale = gradient.abs().max().clamp(min=1e-6)
        assert (gradient - torch.stack(apart).mean(0)).abs().max() / scale < 1e-4


def test_half_precision_leaves_poses_alone(stage1):
    batch = make_batch(stage1.vlm, PROMPTS[0])
    noise = fixed_noise(batch)
    whole = stage1.predict(batch.observation, noise, steps=5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = stage1.predict(batch.observation, noise, steps=5)
    assert half.dtype == torch.float32
    orthonormal = half[..., :16].unflatten(-1, (4, 4))[..., :3, :3]
    assert torch.allclose(orthonormal @ orthonormal.mT, torch.eye(3), atol=1e-5)
    assert (half - whole)[..., :16].abs().max() < 0.2
