"""The released model's recorded numbers, through the command users run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import GOLDEN

REPOSITORY = Path(__file__).parents[2]


def run_check(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "scripts/check_golden.py", *arguments]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)


def test_every_recorded_quantity_is_met():
    result = run_check("--expert", str(GOLDEN / "action_expert"), "--geometry", str(GOLDEN / "geometry"))
    assert result.returncode == 0, result.stdout + result.stderr
    assert "FAIL" not in result.stdout
    for quantity in ("stage0.infer.future_ee_states", "stage1.train.grad.gate", "stage1.mask.active_even"):
        assert quantity in result.stdout


def test_a_wrong_weight_fails_the_check(tmp_path):
    for file in (GOLDEN / "action_expert").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(tmp_path / "stage1_weights.safetensors")
    weights["dp_head.act_head.weight"] = weights["dp_head.act_head.weight"] * 1.01
    save_file(weights, tmp_path / "stage1_weights.safetensors")
    result = run_check("--expert", str(tmp_path))
    assert result.returncode == 1
    assert any("FAIL" in line and "stage1.infer" in line for line in result.stdout.splitlines())


def test_a_missing_folder_is_one_clear_line(tmp_path):
    result = run_check("--expert", str(tmp_path / "nothing"))
    assert result.returncode == 2
    assert len(result.stderr.strip().splitlines()) == 1 and "nothing" in result.stderr


@pytest.mark.parametrize("stage", [0, 1])
def test_released_names_and_ours_map_onto_each_other(stage):
    from apt.model.state_dict_adapter import expert_from_released, expert_to_released

    released = load_file(GOLDEN / "action_expert" / f"stage{stage}_weights.safetensors")
    back = expert_to_released(expert_from_released(released))
    assert set(back) == set(released)
    assert all(torch.equal(back[name], released[name]) for name in released)
    assert json.loads((GOLDEN / "action_expert" / "config.json").read_text())["num_layers"] == 4
