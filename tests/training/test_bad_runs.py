"""Runs that go wrong say so in one line and leave nothing behind that could be taken for a result."""

from __future__ import annotations

import math

import h5py
import numpy as np
import pytest

from apt.checkpoint import load_checkpoint
from apt.infer.loading import load_policy
from apt.train import main
from apt.training.launch import main as launch
from scripts.test_ckpt import main as offline_check
from tests.synthetic import write_episode
from tests.training.helpers import losses, train


@pytest.mark.parametrize("workers", [0, 2])
def test_images_that_do_not_decode_stop_the_run_naming_the_file(tmp_path, monkeypatch, capsys, workers):
    (tmp_path / "episodes").mkdir()
    episode = write_episode(tmp_path / "episodes" / "broken.h5", 0)
    with h5py.File(episode, "r+") as file:
        frames = file["e2h_cam/rgb"]
        for index in range(len(frames)):
            frames[index] = np.frombuffer(b"not a jpeg", np.uint8)
    location = tmp_path / "loc.yaml"
    location.write_text(f"default:\n  PickPlaceCan: {tmp_path / 'episodes'}\n")
    monkeypatch.setenv("APT_DATA_LOC", str(location))
    assert train(tmp_path, "run", max_iterations=2, workers=workers) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "broken.h5" in lines[0] and "e2h_cam/rgb" in lines[0]
    assert not (tmp_path / "ckpt" / "run" / "ckpt_latest.pt").exists()


def test_steps_that_are_not_finite_change_nothing_and_too_many_stop_the_run(tmp_path, located, capsys):
    assert train(tmp_path, "run", max_iterations=60, max_lr=1e30, num_warmup=0, save_latest_interval=1) == 1
    out, err = capsys.readouterr()
    assert "non-finite" in err and "ep00" in err, "the files that were read last are named"
    assert "skipped" in out
    weights = load_checkpoint(tmp_path / "ckpt" / "run" / "ckpt_latest.pt")["weights"]
    assert all(tensor.isfinite().all() for tensor in weights.values())


def test_the_loss_falls_on_a_few_episodes(tmp_path, located):
    assert train(tmp_path, "run", train_stage=1, max_iterations=60, max_lr=1e-3, bs=4, log_interval=10) == 0
    curve = losses(tmp_path, "run")
    assert curve[60] < 0.7 * curve[10] and all(math.isfinite(loss) for loss in curve.values())


def test_flags_that_are_almost_right_are_named_rightly(capsys):
    for typed, meant in (("max_itre", "max_iterations"), ("max_lrr", "max_lr"), ("smaple_by", "sample_by")):
        assert main(["--config", "debug", f"--{typed}", "3"]) == 2
        assert f"unknown flag --{typed}; did you mean --{meant}?" in capsys.readouterr().err


def test_images_that_the_vlm_cannot_cut_into_tokens_are_refused_before_anything_is_built(tmp_path, located, capsys):
    assert train(tmp_path, "run", max_iterations=1, image_size=100) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.endswith("are 100 x 100, and VLM tiny reads squares of 16 pixels; give --image_size 96, or another "
                         "multiple of 16")  # fmt: skip
    assert not (tmp_path / "ckpt").exists()


def test_stage_1_without_a_prior_says_how_to_name_one(tmp_path, capsys):
    assert launch(["train", "--config", "debug", "--gpus", "cpu", "--stage", "1", "--ckpt_dir", str(tmp_path)]) == 2
    assert "--va-name names its run, --one-stage does without" in capsys.readouterr().err


def test_a_dry_run_is_the_first_command_of_a_machine(tmp_path, located, monkeypatch, capsys):
    monkeypatch.setenv("APT_CACHE", str(tmp_path / "cache"))  # nothing is in it yet
    flags = ["--ckpt_dir", str(tmp_path / "c"), "--log_dir", str(tmp_path / "l"), "--dry-run"]
    assert main(["--config", "debug", "--device", "cpu", "--name", "r", *flags]) == 0
    assert "memory" in capsys.readouterr().out


def test_a_policy_is_found_by_the_name_of_its_run(tmp_path, located, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folders = {"ckpt_dir": tmp_path / "checkpoints" / "APT", "max_iterations": 1}
    assert train(tmp_path, "mine", **folders) == 0
    assert offline_check(["--ckpt", "mine", "--train-stage", "1"]) == 0
    assert "checkpoints/APT/mine/ckpt_latest.pt" in capsys.readouterr().out
    load_policy("mine")
    assert offline_check(["--ckpt", "other", "--train-stage", "0"]) == 2
    assert "no checkpoint at other, nor a run of that name under ./checkpoints/APT" in capsys.readouterr().err
