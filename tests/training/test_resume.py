"""A run that is interrupted continues as if it had not been."""

from __future__ import annotations

import os
import shutil
import signal
import time

import pytest
import torch

from apt.checkpoint import load_checkpoint
from tests.training.helpers import losses, start_training, train


def weights(folder, name) -> dict[str, torch.Tensor]:
    return load_checkpoint(folder / "ckpt" / name / "ckpt_latest.pt")["weights"]


@pytest.mark.parametrize("stage, mode, workers", [(0, "frozen", 0), (1, "full", 2)])
def test_a_resumed_run_repeats_the_uninterrupted_one_to_the_bit(tmp_path, located, stage, mode, workers):
    common = {
        "train_stage": stage, "vlm_finetune_mode": mode, "workers": workers, "camera_view_dropout": 0.5,
        "robot_pose_aug": True, "ema_enabled": True, "ema_start": 2, "gradient_accumulation_steps": 2,
    }  # fmt: skip
    # 6 episodes x 3 rounds = 9 batches of 2 per epoch: iteration 3 is in mid-epoch, iteration 7 in the next one.
    assert train(tmp_path, "whole", max_iterations=8, **common) == 0
    assert train(tmp_path, "parts", max_iterations=3, **common) == 0
    assert train(tmp_path, "parts", max_iterations=8, resume=True, **common) == 0
    assert losses(tmp_path, "parts") == losses(tmp_path, "whole")
    whole, parts = (load_checkpoint(tmp_path / "ckpt" / name / "ckpt_latest.pt") for name in ("whole", "parts"))
    for key in ("weights", "vlm_weights"):
        for name, tensor in whole.get(key, {}).items():
            assert torch.equal(tensor, parts[key][name]), name
    for one, other in zip(whole["ema"]["shadow_params"], parts["ema"]["shadow_params"], strict=True):
        assert torch.equal(one, other)


def test_a_run_whose_data_have_changed_begins_a_new_epoch(tmp_path, monkeypatch, episode_dir, capsys):
    data = tmp_path / "data"
    shutil.copytree(episode_dir, data)
    location = tmp_path / "loc.yaml"
    location.write_text(f"default:\n  PickPlaceCan: {data}\n")
    monkeypatch.setenv("APT_DATA_LOC", str(location))
    assert train(tmp_path, "run", max_iterations=7, sample_multiplex=3) == 0  # of 9 batches per epoch
    next(data.glob("*.h5")).unlink()
    next(data.glob("*.h5")).unlink()
    assert train(tmp_path, "run", max_iterations=9, sample_multiplex=3, resume=True) == 0
    said = capsys.readouterr().out
    assert "the data have changed: 12 samples per epoch, 18 before; a new epoch begins" in said and "9/9" in said


def test_the_number_of_workers_does_not_change_the_run(tmp_path, located):
    for workers in (0, 2):
        assert train(tmp_path, f"w{workers}", max_iterations=4, workers=workers) == 0
    assert losses(tmp_path, "w0") == losses(tmp_path, "w2")


def test_sigterm_saves_and_a_resumed_run_goes_on_from_there(tmp_path, data_loc):
    process = start_training(tmp_path, "run", data_loc, max_iterations=100000, save_latest_interval=100000)
    for line in process.stdout:
        if "3/100000" in line:
            break
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert "saved; resume with: APT_DATA_LOC=" in out and "python -m apt.train --config debug --name run" in out
    saved = load_checkpoint(tmp_path / "ckpt" / "run" / "ckpt_latest.pt")["current_iters"]
    assert saved >= 3
    again = start_training(tmp_path, "run", data_loc, max_iterations=saved + 2, resume=True)
    out, err = again.communicate(timeout=120)
    assert again.returncode == 0, err
    assert f"resume: run at iteration {saved}" in out and f"{saved + 2}/{saved + 2}" in out


def test_a_training_process_killed_at_any_moment_leaves_a_checkpoint_to_resume_from(tmp_path, data_loc):
    process = start_training(tmp_path, "run", data_loc, max_iterations=100000, save_latest_interval=1)
    folder = tmp_path / "ckpt" / "run"
    deadline = time.monotonic() + 90
    while not (folder / "ckpt_latest.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(1.0)
    process.kill()
    process.communicate(timeout=30)
    saved = load_checkpoint(folder / "ckpt_latest.pt")["current_iters"]
    again = start_training(tmp_path, "run", data_loc, max_iterations=saved + 1, resume=True)
    out, err = again.communicate(timeout=120)
    assert again.returncode == 0, err
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


def test_a_kill_during_a_save_leaves_the_old_file_or_the_new_one(tmp_path):
    from apt.checkpoint import save_checkpoint

    path = tmp_path / "ckpt_latest.pt"
    payload = torch.arange(500_000, dtype=torch.float32)
    save_checkpoint({"weights": {"w": payload}, "current_iters": 0}, path)
    generation = 0
    for attempt in range(40):
        pid = os.fork()
        if pid == 0:  # writes one generation after another until it is killed
            torch.set_num_threads(1)  # the parent's thread pool did not survive the fork
            while True:
                generation += 1
                save_checkpoint({"weights": {"w": payload + generation}, "current_iters": generation}, path)
        time.sleep(0.002 + 0.0017 * attempt)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        content = load_checkpoint(path)
        generation = content["current_iters"]
        assert torch.equal(content["weights"]["w"], payload + generation)
    assert generation > 0
