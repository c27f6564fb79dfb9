"""The commands that make policies of blocks, at a small size: real demonstrations, real training, real episodes."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from apt.checkpoint import load_checkpoint
from examples.blocks import quickstart, train
from examples.blocks.quickstart import choose_videos

ROOT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.sim,
    pytest.mark.skipif(importlib.util.find_spec("robosuite") is None, reason="no simulator is installed"),
]


def command(module: str, *flags: str) -> list[str]:
    return [sys.executable, "-m", f"examples.blocks.{module}", *flags]


@pytest.mark.slow
def test_the_quickstart_shows_before_and_after_and_does_nothing_twice(tmp_path):
    out = tmp_path / "quick start"
    given = ["--out", str(out), "--episodes", "4", "--vla-iter", "3", "--trials", "2"]
    done = subprocess.run(command("quickstart", *given), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    summary = (out / "summary.txt").read_text()
    assert "before   SO success 0/1" in summary and "after    UO success" in summary and "reference" in summary
    assert {"before.mp4", "after.mp4", "curves.png"} <= {file.name for file in out.iterdir()}
    written = (out / "checkpoints/corner/ckpt_latest.pt").stat().st_mtime_ns
    again = subprocess.run(command("quickstart", *given), cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == 0 and "4 were there already" in again.stdout, again.stderr
    assert (out / "checkpoints/corner/ckpt_latest.pt").stat().st_mtime_ns == written


@pytest.mark.slow
def test_the_training_of_blocks_goes_on_after_ctrl_c_and_leaves_both_policies(tmp_path):
    sizes = "--episodes 6 --va-iter 4 --vla-iter 400 --tune-iter 2".split()
    sizes += "--pair-scenes 250 --trials 1 --compile no --splits SO UI".split()
    given = ["--out", str(tmp_path), *sizes]
    process = subprocess.Popen(command("train", *given), cwd=ROOT, start_new_session=True, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip
    log, deadline = tmp_path / "logs/vla/metrics.jsonl", time.monotonic() + 300
    while not log.exists() and time.monotonic() < deadline:
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.5)
    os.killpg(process.pid, signal.SIGINT)
    said = process.communicate(timeout=120)[0]
    assert process.returncode == 1 and said.endswith("stopped; the same command goes on\n"), said
    reached = load_checkpoint(tmp_path / "checkpoints/vla/ckpt_latest.pt")["current_iters"]
    given[given.index("400")] = str(reached + 2)
    done = subprocess.run(command("train", *given), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all((tmp_path / name / "action_expert.safetensors").is_file() for name in ("policy_va", "policy_vla"))
    assert [line.split()[0] for line in done.stdout.splitlines() if "named object first" in line][-2:] == ["SO", "UI"]


def test_the_quickstarts_videos_are_of_an_episode_that_became_a_success(tmp_path):
    for name, successes in (("before", [0, 1, 0]), ("after_SO", [0, 1, 1, 1])):
        folder = tmp_path / "evaluation" / name
        (folder / "videos").mkdir(parents=True)
        (folder / "episodes.csv").write_text("success\n" + "".join(f"{value}\n" for value in successes))
        for episode in range(len(successes)):
            (folder / "videos" / f"episode_{episode:03d}.mp4").write_text(f"{name} {episode}")
    choose_videos(tmp_path)
    assert [(tmp_path / f"{name}.mp4").read_text() for name in ("before", "after")] == ["before 2", "after_SO 2"]


def test_a_recipe_that_cannot_run_says_so_in_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit, match="^error: --splits: there is no split SU; choose from SO, UO, "):
        train.main(["--out", str(tmp_path / "new"), "--splits", "SO", "SU"])
    assert not (tmp_path / "new").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match="^error: .*file"):
        quickstart.main(["--out", str(tmp_path / "file")])


@pytest.mark.slow
def test_one_command_makes_a_small_vlm_that_policies_take(tmp_path):
    given = ["--out", str(tmp_path), "--scenes", "500", "--vision-steps", "2", "--steps", "2"]
    done = subprocess.run(command("vlm", *given), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"{tmp_path / 'vlm'}, in " in done.stdout
    from apt.model.config import VLAConfig
    from apt.model.vla import VLA

    assert VLA(VLAConfig(model="tiny", vlm=str(tmp_path / "vlm"), vlm_layer_stride=1, num_future=4)).vlm.fingerprint
    again = subprocess.run(command("vlm", *given), cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
