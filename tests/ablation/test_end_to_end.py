"""A small grid for real: demonstrations, both stages, the simulator, and a run that is stopped half-way."""

from __future__ import annotations

import csv
import importlib.util
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from data_utils.files import read_json
from tests.training.helpers import REPOSITORY

pytestmark = [
    pytest.mark.slow,
    pytest.mark.sim,
    pytest.mark.skipif(importlib.util.find_spec("robosuite") is None, reason="the simulator is not installed"),
]

SMALL = """--grid table2 --rows ki_1stage,ki_2stage --config ablate_cpu --seeds 1 --gpus cpu --jobs 2 --bs 2
    --image_size 64 --demo-episodes 3 --demo-test-episodes 1 --va-iter 2 --vla-iter 2 --save_latest_interval 1
    --eval-episodes 1 --eval-max-steps 8 --eval-denoising-steps 2 --eval-noise-seeds 2 --eval-every 40
    --eval-image-size 64""".split()


def ablate(*flags: object) -> subprocess.Popen:
    command = [sys.executable, "-u", "-m", "apt.ablate", *SMALL, *map(str, flags)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(command, cwd=REPOSITORY, env={**os.environ}, text=True, **pipes)


def table(out: Path) -> list[dict[str, str]]:
    with open(out / "table2" / "table.csv", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_a_grid_runs_end_to_end_and_one_that_was_stopped_gives_the_same_table(tmp_path):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    process = ablate("--out", whole)
    text, _ = process.communicate(timeout=400)
    assert process.returncode == 0, text
    rows = table(whole)
    assert [row["row"] for row in rows] == ["ki_1stage", "ki_2stage"] and {row["status"] for row in rows} == {"done"}
    result = read_json(whole / "results/table2/ki_2stage/seed0.json")["values"]
    assert {f"{setting}/success" for setting in ("SO", "UO", "UC", "UOUE")} < set(result)
    assert float(rows[1]["position_cm"]) == pytest.approx(result["position_cm"])
    assert result["language_cm"] > 0 and (whole / "table2/chart.png").stat().st_size > 10_000

    again = ("--rows", "ki_2stage", "--out", stopped, "--demos", whole / "demos")
    process = ablate(*again)
    seen = ""
    for line in process.stdout:
        seen += line
        if " VA prior: " in line:
            process.send_signal(signal.SIGTERM)
            break
    seen += process.communicate(timeout=120)[0]
    assert process.returncode == 128 + signal.SIGTERM and "stopped; go on with: python -m apt.ablate" in seen, seen
    assert not (stopped / "table2/table.csv").exists()
    process = ablate(*again)
    text, _ = process.communicate(timeout=300)
    assert process.returncode == 0 and "VA prior:" not in text, text
    assert table(stopped) == rows[1:]
    process = ablate(*again, "--max_lr", "0.5")
    text, _ = process.communicate(timeout=60)
    assert process.returncode == 2 and "max_lr was 0.001 and is 0.5" in text
