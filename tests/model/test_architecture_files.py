"""Checkpoints of every architecture: what a file holds, what expansion does, what is refused. Files do not depend on
the objective."""

from __future__ import annotations

import copy
import functools
import re
from pathlib import Path

import pytest
import torch

from apt.checkpoint import load_checkpoint
from apt.hub_folder import write_folder
from apt.model.experts.registry import ARCHITECTURES
from apt.model.pretrained import CheckpointMismatch, Origin
from apt.model.vla import VLA
from apt.presets import CONFIGS
from tests.model.helpers import build, fixed_noise, make_batch
from train_utils.saving import save_checkpoint

# Blocks of the tiny VLM's four features in each stage, and where Stage 1's block i goes.
DOUBLED = {"apt", "token_insertion"}
BLOCK = re.compile(r"(?<=layers\.|blocks\.)\d+(?=\.)")


@pytest.fixture(params=ARCHITECTURES)
def arch(request) -> str:
    return request.param


def content_of(model: VLA) -> dict:
    return {**model.file_content(), "current_iters": 1}


@functools.cache
def _content(arch: str, stage: int) -> dict:
    return content_of(build(stage, arch=arch))


def some_content(arch: str, stage: int) -> dict:
    """Of a policy of this kind, to change as one likes."""
    return copy.deepcopy(_content(arch, stage))


def load(model: VLA, content: dict, **options):
    return model.start_from(content, **options)


def state(model: VLA) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("stage, mode", [(0, "frozen"), (1, "lora")])
def test_a_file_and_an_exported_folder_give_back_the_policy(arch, stage, mode, tmp_path):
    model = build(stage, arch=arch, vlm_mode=mode)
    with torch.no_grad():
        for parameter in model.vlm.parameters():
            if parameter.requires_grad:
                parameter.add_(0.01 * torch.randn_like(parameter))
    batch = make_batch(model.vlm, ["go"])
    planned = model.predict(batch.observation, fixed_noise(batch), 2)
    path = tmp_path / "ckpt_latest.pt"
    save_checkpoint(content_of(model), path)
    places = [path]
    if stage == 1:
        places.append(tmp_path / "folder")
        write_folder(load_checkpoint(path), CONFIGS["debug"].to_dict() | {"arch": arch}, "", places[1])
    other = build(stage, seed=1, arch=arch, vlm_mode=mode)
    for place in places:
        with torch.no_grad():
            for parameter in other.released_parameters():
                parameter.add_(1.0)
        content = load_checkpoint(place)
        assert Origin.of(content) == model.origin == Origin(arch, stage)
        other.load(content)
        assert torch.equal(other.predict(batch.observation, fixed_noise(batch), 2), planned)
        for ours, theirs in zip(model.released_parameters(), other.released_parameters(), strict=True):
            assert torch.equal(ours, theirs)


def test_a_prior_is_expanded_by_the_architectures_rule(arch):
    """Two kinds of rules: block i becomes 2i + 1 and even blocks stay fresh, or every tensor is copied."""
    prior, model = build(0, arch=arch), build(1, seed=1, arch=arch)
    fresh, source = model.released_weights(), prior.released_weights()
    fresh = {name: tensor.clone() for name, tensor in fresh.items()}
    report = load(model, content_of(prior), load_from_va=True)
    doubled = arch in DOUBLED
    assert (len(prior.expert.blocks), len(model.expert.blocks)) == ((2, 4) if doubled else (4, 4))

    def place(name: str) -> str:
        return BLOCK.sub(lambda index: str(2 * int(index[0]) + 1), name) if doubled else name

    expanded = {place(name): tensor for name, tensor in source.items()}
    assert not report.dropped and set(report.copied) == set(expanded)
    for name, tensor in model.released_weights().items():
        assert torch.equal(tensor, expanded.get(name, fresh[name])), name
    assert {BLOCK.search(name)[0] for name in report.fresh} == ({"0", "2"} if doubled else set())


def test_what_does_not_fit_is_refused_in_one_line_and_changes_nothing(arch):
    model = build(1, seed=1, arch=arch)
    before = state(model)
    other = next(name for name in ARCHITECTURES if name != arch)
    foreign = some_content(other, 1)
    for content, options, message in (
        (foreign, {}, f"arch '{other}', not '{arch}'; give --arch {other}$"),
        (foreign, {"load_from_va": True}, f"arch '{other}', not '{arch}'"),
        (some_content(arch, 0), {}, "stage-0 checkpoint, a stage-1 one is wanted.*--load-from-va"),
        (content_of(model), {"load_from_va": True}, "stage-1 checkpoint, a stage-0 one is wanted"),
        (content_of(build(1, arch=arch, model="small")), {}, r"tensors differ in shape \(another model size\?\)"),
        (content_of(build(1, arch=arch, vlm_mode="lora")), {}, "LoRA adapters need --vlm-mode lora"),
    ):
        with pytest.raises(CheckpointMismatch, match=message) as caught:
            load(model, content, **options)
        assert "\n" not in str(caught.value)
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_file_that_says_neither_architecture_nor_stage_holds_apts_expert(arch):
    """As released files do; of another architecture it is refused."""
    content = some_content(arch, 1)
    del content["arch"], content["train_stage"]
    if arch == "apt":
        assert Origin.of(content) == Origin("apt", 1)
        assert load(build(1, seed=1), content).fresh == []
    else:
        with pytest.raises(CheckpointMismatch, match="holds no action expert"):
            load(build(1, seed=1), content)
        with pytest.raises(CheckpointMismatch, match=f"arch 'apt', not '{arch}'"):
            load(build(1, seed=1, arch=arch), content)


def test_a_file_of_another_architecture_must_say_its_stage(arch):
    content = some_content(arch, 1)
    del content["train_stage"]
    if arch == "apt":
        assert Origin.of(content).stage == 1
    else:
        with pytest.raises(CheckpointMismatch, match="does not say of which stage"):
            load(build(1, seed=1, arch=arch), content)


def test_a_load_wants_every_tensor(arch):
    content = some_content(arch, 1)
    del content["weights"][next(name for name in content["weights"] if name.endswith("to_out.weight"))]
    with pytest.raises(CheckpointMismatch, match="it lacks 1 of the model's tensors"):
        model = build(1, seed=1, arch=arch)
        model.load(content)


def test_names_of_architectures_are_checked_before_anything_is_built():
    with pytest.raises(ValueError, match="unknown arch 'rnn'; choose from apt, pi, gr00t, token_insertion"):
        build(1, arch="rnn")
    assert all(Path(module.partition(":")[0].replace(".", "/") + ".py").is_file() for module in ARCHITECTURES.values())
