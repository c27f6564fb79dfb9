"""No figure outlives its script: every benchmark runs, at its smallest size."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from examples.libero.environment import ROOT, VENV

#: script -> its smallest run, and what the table that it prints must have
SMALLEST = {
    "architectures": ("--vlm tiny --bs 1 --repeat 1 --steps 1 --device cpu", r"token_insertion \|.*x apt"),
    "batching": ("--sessions 1 2 --queries 1 --steps 1 --device cpu", r"\| 2 \| [\d.]+ \| [\d.]+ \| [\d.]+ \|"),
    "convert": ("--baseline HEAD --episodes 2 --frames 20 --repeats 1", r"these files \| \d"),
    "denoise": ("--no-compile --repeats 1 --steps 1 --queries 1 --device cpu", r"eager, 10 steps +\d"),
    "kinematics": (
        "--rows 500 --steps 5 --repeats 1",
        r"poses to joints, 7 joints \| [\d,]+ \| [\d,]+ .mink. \| [\d.]+x",
    ),
    "libero_overhead": ("--steps 20 --repeats 1 --image-size 64", r"ratio \d"),
    "large_set": ("--episodes 100 --nodes 1 --cores 1 --frames 20 --side 96", r"stored as videos .*MB"),
    "loader": ("--seconds 0.06 --episodes 2 --frames 24 --size 96", r"this loader, video +\d"),
    "loader_memory": ("--episodes 40 --samples 200 --workers 1", r"\d+ samples/s"),
    "soak": ("--queries 40 --report 20", r"verdict: flat"),
    "train_step": ("--vlm tiny --bs 1 --steps 1 --warmup 1 --device cpu --only 1frozen", r"Stage 1 .*cache warm"),
    "transport": ("--seconds 0.05 --rounds 1", r"3 x 480 x 640 +shm_transport +\d.*x"),
}


def scripts() -> set[str]:
    return {path.stem for path in (ROOT / "benchmarks").glob("*.py") if "__main__" in path.read_text(encoding="utf-8")}


def test_every_benchmark_has_a_smallest_run():
    assert scripts() == set(SMALLEST)


@pytest.mark.slow
@pytest.mark.parametrize("script", sorted(SMALLEST))
def test_every_benchmark_prints_its_table(script):
    if script == "libero_overhead" and not any(VENV.glob("lib/python3*/site-packages/libero/libero/assets/scenes")):
        pytest.skip("LIBERO or its assets are not there; run: bash examples/libero/setup.sh")
    if script == "convert" and not (ROOT / ".git").exists():
        pytest.skip("compares revisions, and this is no clone")
    arguments, wanted = SMALLEST[script]
    start = ["-m", f"benchmarks.{script}"] if script == "libero_overhead" else [f"benchmarks/{script}.py"]
    done = subprocess.run([sys.executable, *start, *arguments.split()], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(wanted, done.stdout), done.stdout
