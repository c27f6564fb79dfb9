"""Several processes train as one would."""

from __future__ import annotations

import os
import subprocess
import sys

import torch

from apt.checkpoint import load_checkpoint
from tests.training.helpers import REPOSITORY, losses, start_training


def run_gradients(out, processes: int) -> dict[str, torch.Tensor]:
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command += ["-m", "tests.training.ddp_gradients", str(out)]
    result = subprocess.run(
        command, cwd=REPOSITORY, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=180
    )
    assert result.returncode == 0, result.stderr[-2000:]
    return torch.load(out, weights_only=True)


def test_two_gloo_processes_average_to_the_gradients_of_the_joined_batch(tmp_path):
    alone, averaged = run_gradients(tmp_path / "one.pt", 1), run_gradients(tmp_path / "two.pt", 2)
    assert set(alone) == set(averaged)
    for name, gradient in alone.items():
        scale = gradient.abs().max().clamp(min=1e-6)
        assert ((averaged[name] - gradient).abs().max() / scale) < 1e-3, name


def test_a_two_process_run_trains_saves_once_and_resumes(tmp_path, data_loc):
    for limit, resume in ((2, False), (4, True)):
        process = start_training(tmp_path, "run", data_loc, processes=2, max_iterations=limit, resume=resume, workers=1)
        out, err = process.communicate(timeout=240)
        assert process.returncode == 0, err[-3000:]
        assert out.count("done:") == 1
    assert set(losses(tmp_path, "run")) == {1, 2, 3, 4}
    assert load_checkpoint(tmp_path / "ckpt" / "run" / "ckpt_latest.pt")["current_iters"] == 4
