"""The commands that train policies of LIBERO, at a tiny size: real scenes, real training, real episodes."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from examples.libero import full
from examples.libero.environment import ROOT
from tests.libero.test_libero_expert import needs_simulator

both_in_one = pytest.mark.skipif(
    importlib.util.find_spec("libero") is None,
    reason="LIBERO is not in this environment; run: bash examples/libero/setup.sh --venv .venv",
)


def run(module: str, *flags: object) -> str:
    command = [sys.executable, "-m", f"examples.libero.{module}", *map(str, flags)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.sim
@needs_simulator
@both_in_one
def test_one_command_leads_from_pictures_to_a_policy_in_closed_loop(tmp_path):
    sizes = "--scenes 500 --pair-scenes 250 --vision-steps 2 --vlm-steps 2 --episodes 1 --va-iter 2 --vla-iter 2"
    sizes += " --tune-iter 2 --trials 1 --max-steps 8 --compile no"
    said = run("train", "--out", tmp_path, *sizes.split())
    assert "libero_object: 0/10 0.0%" in said and "small" in (tmp_path / "summary/summary.md").read_text()
    assert (tmp_path / "policy_vla/action_expert.safetensors").is_file()
    written = (tmp_path / "checkpoints/tuned/ckpt_latest.pt").stat().st_mtime_ns
    run("train", "--out", tmp_path, *sizes.split())
    assert (tmp_path / "checkpoints/tuned/ckpt_latest.pt").stat().st_mtime_ns == written


@pytest.mark.slow
@pytest.mark.sim
@needs_simulator
@both_in_one
def test_all_suites_are_trained_on_and_twelve_evaluated(tmp_path):
    sizes = "--gpus cpu --tasks 0 --episodes 1 --va-iter 2 --vla-iter 2 --bs 2 --trials 1 --max-steps 8 --workers 2"
    tiny = "--model tiny --vlm_layer_stride 1 --fp16 False --augment False --num_warmup 1"
    said = run("full", "--out", tmp_path, *sizes.split(), "--image-size", 64, "--vlm", "tiny", f"--train={tiny}")
    assert said.count(": 0/1 0.0%") == 12
    assert "libero_10_task" in (tmp_path / "summary/summary.md").read_text()
    record = json.loads((tmp_path / "results/libero-pro/libero_object_swap/full.json").read_text())
    assert record["settings"]["policy"]["checkpoint"]["name"] == "vla/ckpt_latest.pt"


def test_demonstrations_of_all_suites_are_wanted(tmp_path: Path):
    (tmp_path / "libero_spatial").mkdir()
    with pytest.raises(ValueError, match="has no folder libero_object; wanted one of episodes per suite"):
        full.FullConfig(demos=tmp_path)
