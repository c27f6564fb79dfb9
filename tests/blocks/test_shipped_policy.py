"""The shipped weights do what their cards say, and a short training learns what it should; all real."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from apt.infer import doctor
from apt.infer.loading import load_policy
from apt.infer.slim import main as slim
from examples.blocks.recipe import Recipe
from examples.blocks.shipped import MODELS, POLICY, PRIOR

ROOT = Path(__file__).parents[2]
needs_simulator = pytest.mark.skipif(importlib.util.find_spec("robosuite") is None, reason="no simulator is installed")


def test_all_shipped_weights_together_have_at_most_30_megabytes():
    assert sum(file.stat().st_size for file in MODELS.rglob("*") if file.is_file()) <= 30e6


def test_the_shipped_policy_loads_and_its_card_says_how_it_was_made():
    _, config = load_policy(POLICY)
    assert config.train_stage == 1 and config.vlm == "blocks" and config.ckpt_dir == "./checkpoints/APT"
    assert list(config.data) == ["Blocks"] and not config.changed_rules()  # kept with it, and still what the class says
    assert load_policy(PRIOR)[1].train_stage == 0
    assert "bash examples/blocks/train.sh" in (POLICY / "README.md").read_text(encoding="utf-8")


def test_a_slim_folder_has_the_averaged_weights_in_half_the_bytes(tmp_path):
    assert slim([str(POLICY), str(tmp_path / "again"), "--bf16"]) == 0
    again, _ = load_policy(tmp_path / "again")
    before, _ = load_policy(POLICY)
    for name, tensor in before.released_weights().items():
        assert (again.released_weights()[name] == tensor).all()
    assert slim([str(POLICY), str(tmp_path / "again")]) == 2  # it exists


def test_the_doctor_finds_a_sound_set_up_and_says_what_is_off(tmp_path, capsys):
    assert doctor.main(["--no-simulator"]) == 0
    assert "ok   set-up" in capsys.readouterr().out
    (tmp_path / "results").mkdir()
    weak = {"episodes": 20, "success": {"count": 2}, "approached_named": {"count": 19}}
    (tmp_path / "results" / "summary.json").write_text(json.dumps(weak))
    (tmp_path / "broken.hdf5").write_bytes(b"no episode")
    options = ["--no-simulator", "--results", str(tmp_path / "results"), "--episodes", str(tmp_path)]
    assert doctor.main(options) == 1
    said = capsys.readouterr().out
    assert "OFF  data      broken.hdf5" in said and "precision" in said and "off: data, results" in said
    log = tmp_path / "log"
    log.mkdir()
    losses = [{"step": step, "loss/total": 5.0} for step in range(12)]
    (log / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in losses))
    assert doctor.main(["--no-simulator", "--run", str(POLICY), "--log", str(log)]) == 1
    assert "OFF  training" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.sim
@needs_simulator
def test_the_shipped_policy_goes_to_what_is_named_and_succeeds_about_as_often_as_its_card_says(tmp_path):
    command = [sys.executable, "-m", "examples.blocks.evaluate", "--split", "SO", "--episodes", "10", "--seed", "7"]
    done = subprocess.run([*command, "--out", str(tmp_path / "out")], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("SO success ")
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["approached_named"]["count"] >= 8 and summary["success"]["count"] >= 6


@pytest.mark.slow
@pytest.mark.sim
@needs_simulator
def test_a_short_training_foresees_the_motions_of_an_arm(tmp_path):
    """Of forty demonstrations, 150 steps of Stage 1: what it reached when this was written, with room."""
    recipe = Recipe(tmp_path)
    recipe.record(40)
    recipe.training.train(0, "va", 150, "--num_warmup", "20", "--eval_every", "0")
    rows = [json.loads(line) for line in (tmp_path / "logs/va/metrics.jsonl").read_text().splitlines()]
    found = next(row for row in rows if "eval/loss" in row)
    assert found["eval/position_cm"] <= 11 and found["eval/rotation_deg"] <= 4 and found["eval/gripper_wrong"] <= 0.2
