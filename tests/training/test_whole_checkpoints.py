"""One judgement of what fits: of scripts/test_ckpt.py, the planner, and training that starts from a file."""

import shutil
from pathlib import Path

import pytest
import torch

from apt.checkpoint import CheckpointError, load_checkpoint
from apt.infer.loading import load_policy
from apt.model.encoders import hub
from apt.model.encoders.fingerprint import fingerprint
from apt.model.pretrained import CheckpointMismatch
from apt.model.vla import VLA
from apt.presets import CONFIGS
from scripts import test_ckpt as offline_check
from tests.model.helpers import build
from train_utils.saving import save_checkpoint

MODES = ("frozen", "lora", "full")


@pytest.fixture(scope="module")
def contents() -> dict[str, dict]:
    """What a run of each mode saves."""
    return {mode: {**build(1, vlm_mode=mode, vlm_layer_stride=1).file_content(), "current_iters": 1} for mode in MODES}


class Asked:
    """One file, judged by all who load it."""

    def __init__(self, folder: Path, capfd: pytest.CaptureFixture) -> None:
        self.path, self._capfd = folder / "ckpt_latest.pt", capfd

    def write(self, content: dict, mode: str = "frozen", **fields) -> None:
        from apt.checkpoint import write_config

        self.path.parent.mkdir(exist_ok=True)
        save_checkpoint(content, self.path)
        config = CONFIGS["debug"].to_dict() | {"vlm_finetune_mode": mode, "train_stage": 1, "vlm_layer_stride": 1}
        write_config(self.path.parent, config | fields)

    def offline(self, *flags: str) -> tuple[int, str]:
        status = offline_check.main(["--ckpt", str(self.path), "--train-stage", "1", *flags])
        out, err = self._capfd.readouterr()
        return status, out + err

    def planner(self) -> VLA:
        return load_policy(self.path)[0]


@pytest.fixture
def asked(tmp_path, capfd) -> Asked:
    return Asked(tmp_path / "run", capfd)


def without(tensors: dict, name: str) -> dict:
    return {other: tensor for other, tensor in tensors.items() if other != name}


def test_what_a_run_of_any_mode_saves_fits(contents, asked):
    for mode, content in contents.items():
        shutil.rmtree(asked.path.parent, ignore_errors=True)
        asked.write(content, mode)
        status, said = asked.offline()
        assert status == 0 and said.endswith("fits\n") and "missing    0" in said, said
        assert all(torch.equal(v, content["weights"][n]) for n, v in asked.planner().released_weights().items())


LACKS, NOT_FINITE = "it lacks 1 of the model's tensors", "1 of its tensors hold numbers that are not finite"


def spoilt(tensors: dict, name: str, value: float) -> dict:
    return tensors | {name: torch.full_like(tensors[name], value)}


@pytest.mark.parametrize("change, message", [
    (without, LACKS),
    (lambda tensors, name: spoilt(tensors, name, float("nan")), NOT_FINITE),
    (lambda tensors, name: spoilt(tensors, name, float("-inf")), NOT_FINITE),
    (lambda tensors, name: tensors | {name: tensors[name][:1]}, "1 tensors differ in shape"),
])  # fmt: skip
@pytest.mark.parametrize("mode, part", [("frozen", "weights"), ("lora", "vlm_weights"), ("full", "vlm_weights")])
def test_a_spoilt_tensor_of_expert_or_vlm_is_refused_by_all_alike(contents, asked, mode, part, change, message):
    content = dict(contents[mode])
    name = sorted(name for name, tensor in content[part].items() if len(tensor) > 1)[3]
    content[part] = change(content[part], name)
    content["vlm_tensors"] = len(content.get("vlm_weights") or {})  # the file itself is as its writer left it
    asked.write(content, mode)
    status, said = asked.offline()
    assert status == 2 and message in said.splitlines()[-1] and name in said, said
    with pytest.raises(CheckpointMismatch, match=message):
        asked.planner()
    if not (mode == "full" and message == LACKS):  # a start may have been tuned in fewer parts
        with pytest.raises(CheckpointMismatch, match=message):
            build(1, seed=1, vlm_mode=mode, vlm_layer_stride=1).start_from(load_checkpoint(asked.path))


@pytest.mark.parametrize("mode", ["lora", "full"])
@pytest.mark.parametrize("kept", [0, 2])
def test_a_file_without_some_or_all_of_its_vlm_tensors_is_not_whole(contents, asked, mode, kept):
    content = dict(contents[mode])
    names = sorted(content["vlm_weights"])
    content["vlm_weights"] = {name: content["vlm_weights"][name] for name in (names[::kept] if kept else ())}
    asked.write(content, mode)
    status, said = asked.offline()
    assert status == 2 and f"was saved with {len(names)}: it is not whole" in said
    with pytest.raises(CheckpointError, match="it is not whole"):
        asked.planner()


@pytest.mark.parametrize("wrap", [
    lambda name: f"module.{name}",
    lambda name: f"_orig_mod.{name}",
    lambda name: f"module._orig_mod.{name}",
    lambda name: name.replace(".", "._orig_mod.", 1),
    lambda name: name.replace(".", "._fsdp_wrapped_module.", 2),
])  # fmt: skip
def test_names_of_wrappers_are_taken_off_and_said(contents, asked, caplog, wrap):
    content = dict(contents["lora"])
    for part in ("weights", "vlm_weights"):
        content[part] = {wrap(name): tensor for name, tensor in content[part].items()}
    asked.write(content, "lora")
    assert asked.offline()[0] == 0
    assert all(torch.equal(v, contents["lora"]["weights"][n]) for n, v in asked.planner().released_weights().items())
    assert "left out of the names of its tensors: " in caplog.text


def test_a_tensor_that_is_there_with_and_without_a_wrappers_name_is_refused(contents, asked):
    content = dict(contents["frozen"])
    name, tensor = next(iter(content["weights"].items()))
    content["weights"] = {**content["weights"], f"module.{name}": tensor}
    asked.write(content)
    with pytest.raises(CheckpointError, match=f"holds {name} twice"):
        asked.planner()
    assert asked.offline()[0] == 2


def test_a_prior_leaves_fresh_what_it_cannot_hold_and_must_hold_the_rest():
    model = build(1, seed=1, vlm_layer_stride=1)
    content = build(0, vlm_layer_stride=1).file_content()
    fresh = model.start_from(content, load_from_va=True).fresh
    assert fresh
    name = sorted(content["weights"])[5]
    content["weights"] = without(content["weights"], name)
    with pytest.raises(CheckpointMismatch, match="it lacks 1 of the model's tensors"):
        model.start_from(content, load_from_va=True)


def test_a_policy_notices_a_vlm_of_the_same_name_and_other_weights(contents, asked, tmp_path):
    vlm = tmp_path / "vlm"
    shutil.copytree(hub.resolve("tiny"), vlm)
    asked.write(contents["frozen"], vlm=str(vlm))
    asked.planner()
    model = hub.load_model(str(vlm), torch.float32)
    assert fingerprint(model.to(torch.bfloat16)) == fingerprint(hub.load_model(str(vlm), torch.bfloat16))
    with torch.no_grad():
        for parameter in model.float().parameters():
            parameter.add_(0.1)
    model.save_pretrained(vlm)
    with pytest.raises(CheckpointMismatch, match="it was trained on a VLM of other weights"):
        asked.planner()
    assert asked.offline()[0] == 2
    trained = build(1, vlm_layer_stride=1, vlm=str(vlm))
    assert trained.start_from(load_checkpoint(asked.path)).other_vlm
    with pytest.raises(CheckpointMismatch, match="it was trained on a VLM of other weights"):
        trained.start_from(load_checkpoint(asked.path), any_vlm=False)
    asked.write(contents["full"], "full", vlm=str(vlm))  # which brings all that it reads
    asked.planner()


def test_an_average_that_is_not_finite_is_refused(contents, asked):
    content = dict(contents["full"])
    model = build(1, vlm_mode="full", vlm_layer_stride=1)
    shadow = [parameter.detach().clone() for parameter in model.parameters() if parameter.requires_grad]
    content["ema"] = {"decay": 0.9, "num_updates": 3, "shadow_params": shadow}
    asked.write(content, "full")
    load_policy(asked.path, use_ema=True)
    shadow[7][0] = float("inf")
    save_checkpoint(content, asked.path)
    with pytest.raises(ValueError, match="the EMA holds numbers that are not finite"):
        load_policy(asked.path, use_ema=True)
    assert "NOT FINITE" in asked.offline()[1]
