"""A policy goes by the sampling rules that it was trained with; who would mix two sets of rules is told."""

from __future__ import annotations

import logging
import os

import pytest

from apt.checkpoint import read_config, write_config
from apt.infer import open_loop
from apt.infer.planner import TrajPlanner
from tests.data.episodes import write_episode
from tests.training.helpers import train

RULES = "cameras: [front, wrist]\nwrist_cameras: [wrist]\nsample_dt: 0.1\nnum_future: 8\n"


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """A short run on a robot that a YAML file describes, and that file."""
    robot = tmp_path / "robot"
    robot.mkdir()
    for number in range(4):
        write_episode(robot / f"{number}.h5", frames=12)
    (robot / "robot.yaml").write_text(RULES)
    monkeypatch.chdir(tmp_path)
    assert train(tmp_path, "run", dataset_classes=(robot / "robot.yaml",), max_iterations=1, train_stage=1) == 0
    return tmp_path / "ckpt" / "run" / "ckpt_latest.pt", robot / "robot.yaml"


def change(robot, text: str) -> None:
    robot.write_text(text)
    os.utime(robot, ns=(1, 1))


def test_a_planner_goes_by_the_stored_rules_when_they_have_changed_or_are_gone(trained, caplog, tmp_path, capsys):
    ckpt, robot = trained
    change(robot, RULES.replace("0.1", "0.5"))
    with caplog.at_level(logging.WARNING):
        assert TrajPlanner(ckpt, device="cpu").get_config().sample_dt == 0.1
    assert f"goes by the sampling rules that it was trained with ({robot}: sample_dt 0.1, today 0.5)" in caplog.text
    caplog.clear()
    robot.unlink()
    assert TrajPlanner(ckpt, device="cpu").get_config().num_future == 8 and not caplog.text
    folder = str(robot.parent)
    arguments = ["--episodes", folder, "--train-episodes", folder, "--steps", "2", "--device", "cpu"]
    assert open_loop.main(["--ckpt", str(ckpt), *arguments]) == 0
    assert "8 future steps" in capsys.readouterr().out


def test_a_checkpoint_of_an_earlier_version_says_that_todays_class_is_taken(trained, caplog):
    ckpt, robot = trained
    write_config(ckpt.parent, {name: value for name, value in read_config(ckpt).items() if name != "data"})
    with caplog.at_level(logging.WARNING):
        TrajPlanner(ckpt, device="cpu")
    assert caplog.text.count("does not say how its data were sampled") == 1 and "robot.yaml is taken" in caplog.text


def test_resuming_under_other_rules_is_refused_and_a_fine_tune_says_what_changes(trained, tmp_path, capsys):
    ckpt, robot = trained
    change(robot, RULES.replace("0.1", "0.5"))
    common = {"dataset_classes": (robot,), "max_iterations": 2, "train_stage": 1}
    assert train(tmp_path, "run", resume=True, **common) == 2
    said = capsys.readouterr().err
    assert f"error: run run was trained with other sampling rules ({robot}: sample_dt 0.1, today 0.5)" in said
    assert train(tmp_path, "tuned", pretrained_ckpt=ckpt, **common) == 0
    assert f"was trained with sample_dt 0.1 ({robot}), this run has 0.5" in capsys.readouterr().out
    other = robot.with_name("other.yaml")
    other.write_text(RULES.replace("0.1", "0.2"))
    assert train(tmp_path, "moved", pretrained_ckpt=ckpt, **{**common, "dataset_classes": (other,)}) == 0
    assert f"trained with sample_dt 0.1 ({robot} instead of {other}), this run has 0.2" in capsys.readouterr().out
