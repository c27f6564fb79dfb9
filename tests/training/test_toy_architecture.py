"""An architecture of one file and one line: the one that docs/architectures.md builds."""

from __future__ import annotations

import dataclasses
import re
import shlex

import numpy as np
import pytest

from apt.checkpoint import load_checkpoint
from apt.infer.planner import TrajPlanner
from apt.model.experts.registry import ARCHITECTURES
from apt.model.pretrained import Origin
from apt.training import stages
from data_utils.datasets import PickPlaceCan
from tests.infer.helpers import frame_at
from tests.model import test_architectures as conformance
from tests.model import toy_expert
from tests.training.helpers import REPOSITORY, losses, train

DOC = REPOSITORY / "docs" / "architectures.md"
KIND = conformance.Kind("toy", "flow")


@pytest.fixture(autouse=True)
def registered(monkeypatch) -> None:
    monkeypatch.setitem(ARCHITECTURES, "toy", f"{toy_expert.__name__}:ToyExpert")


def test_the_documents_file_is_the_one_that_is_tested():
    code = re.findall(r"```python\n(.*?)```", DOC.read_text(encoding="utf-8"), re.S)
    assert code[0] == (REPOSITORY / "tests/model/toy_expert.py").read_text(encoding="utf-8")
    assert code[1].strip() == '"toy": "apt.model.experts.toy:ToyExpert",'


def test_it_trains_saves_expands_resumes_and_plans(tmp_path, located):
    fields = {"arch": "toy", "objective": "flow"}
    assert train(tmp_path, "va", train_stage=0, max_iterations=1, **fields) == 0
    fields |= {"pretrained_ckpt": "va", "load_from_va": True}
    assert train(tmp_path, "vla", max_iterations=1, **fields) == 0
    assert train(tmp_path, "vla", max_iterations=2, resume=True, **fields) == 0
    assert all(np.isfinite(loss) for loss in losses(tmp_path, "vla").values())
    path = tmp_path / "ckpt" / "vla" / "ckpt_latest.pt"
    assert Origin.of(load_checkpoint(path)) == Origin("toy", 1)
    planner = TrajPlanner(path, ensemble=0, device="cpu")
    config = dataclasses.replace(PickPlaceCan.config, image_hw=(64, 64))
    planner.set_prompt("reach for the red square")
    planner.add_obs_frame(frame_at(PickPlaceCan(config=config, train=False), 0, 3))
    poses, _, times, _ = planner.get_action(2)
    assert poses.shape == (2, 32, 1, 4, 4) and np.isfinite(poses).all() and len(times) == 32


def test_it_meets_the_tests_of_every_architecture():
    conformance.test_stage1_ignores_the_prompt_to_the_bit(KIND, ())
    conformance.test_stage2_follows_the_prompt(KIND)
    conformance.test_several_draws_per_observation_give_the_mean_gradient_of_as_many_passes(KIND)
    for stage in (0, 1):
        conformance.test_a_prediction_has_a_state_for_every_sample_step_and_arm(KIND, stage)
        conformance.test_a_camera_that_is_not_shown_does_not_reach_the_prediction(KIND, stage)
        conformance.test_an_invalid_arm_changes_nothing_for_the_valid_one(KIND, stage)
        conformance.test_neither_padding_nor_the_other_samples_of_a_batch_change_a_prediction(KIND, stage)
        conformance.test_cached_sampling_equals_uncached_sampling_by_diffusers(KIND, stage)


def test_it_must_read_the_vlms_layers_in_their_order():
    with pytest.raises(ValueError, match=r"reads hidden_states \(3, 0\) of the VLM; wanted ascending indices from 0"):
        toy_expert.VLMReads(hidden_states=(3, 0))


def commands() -> list[list[str]]:
    """The document's commands, split into words."""
    blocks = re.findall(r"```bash\n(.*?)```", DOC.read_text(encoding="utf-8"), re.S)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(line) for line in lines if line and not line.startswith("export ")]


def test_the_documents_training_commands_mean_what_they_say(located, tmp_path):
    """Of the presets that train on data which are here; the others differ in their data alone."""
    trained = set()
    for command in commands():
        if command[:2] != ["bash", "scripts/train.sh"]:
            assert (REPOSITORY / command[1]).is_file() or command[1:3] == ["-m", "pytest"], command
            continue
        words = ["debug" if word in ("pretrain", "blocks") else word for word in command[2:]]
        if "--gpus" in words:
            words[words.index("--gpus") + 1] = "cpu"
        where = ["--ckpt_dir", str(tmp_path), "--log_dir", str(tmp_path)]
        planned = stages.plan("train", [*words, *where])[1]
        assert [stage.config.train_stage for stage in planned] == [0, 1]
        for stage in planned:
            assert stage.config.arch == words[words.index("--arch") + 1]
            trained.add(stage.config.arch)
    assert trained == {"apt", "pi", "gr00t", "token_insertion"}
