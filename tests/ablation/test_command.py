"""The command ``python -m apt.ablate``: what it refuses, lists, and says of a folder in use."""

from __future__ import annotations

import fcntl
import re

import pytest

from apt import ablate
from apt.ablate import main, plan
from tests.ablation.helpers import finish

BASE = "--grid table2 --config debug --seeds 1 --gpus cpu".split()


@pytest.fixture
def simulator(monkeypatch):
    """As if it were installed, whether it is or not: nothing here runs it."""
    monkeypatch.setattr(ablate, "_has_simulator", lambda: True)


@pytest.mark.usefixtures("simulator")
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--vlm_finetune_mode", "lora"], "--vlm_finetune_mode is set by the rows of grid table2"),
        (["--max-iterations=5"], "--max_iterations is set by the ablation itself"),
        (["--seeds", "0"], "--seeds is 0"),
        (["--cells", "ki_1stage/seed0,ki_1stage/seed1"], "no cell ki_1stage/seed1; wanted ki_1stage/seed0"),
        (["--rows", "nothing"], "no row nothing; it has ki_1stage"),
        (["--evaluation", "guess"], "wanted pickplace, open_loop, blocks, blocks_open_loop, or module:function"),
        (["--evaluation", "json:no_such"], "no_such"),
        (["--eval-noise-seeds", "1"], "--eval-noise-seeds is 1; wanted at least 2"),
        (["--demos", "/nowhere"], "has no folder train"),
        (["--gpus", "first"], "--gpus is 'first'"),
        (["--no_such_flag", "1"], "unknown flag --no_such_flag"),
        (["--config", "nothing"], "unknown config"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(tmp_path, capsys, flags, message):
    assert main([*BASE, "--out", str(tmp_path / "out"), *flags]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and error.startswith("error: ")
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("simulator")
def test_a_dry_run_lists_the_cells_and_what_is_left_and_writes_nothing(tmp_path, capsys):
    argv = [*BASE, "--out", str(tmp_path / "out")]
    assert main([*argv, "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert "4 cells" in text and "1 x stage 0; 4 x stage 1; 4 x evaluation" in text and "no estimate" in text
    assert not (tmp_path / "out").exists()
    study = plan(argv).study
    finish(study, study.cells[0])
    main([*argv, "--dry-run"])
    assert "ki_1stage/seed0" in (line := capsys.readouterr().out.splitlines()[1]) and line.endswith("done")


@pytest.mark.usefixtures("simulator")
def test_a_cell_can_be_given_to_another_machine_and_its_result_brought_back(tmp_path, capsys):
    there = ["--out", str(tmp_path / "there"), "--cells", "joint_1stage/seed0"]
    assert main([*BASE, *there, "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert "1 x stage 1; 1 x evaluation" in text and text.count("left out") == 3
    finish(plan([*BASE, *there]).study, plan([*BASE, *there]).study.cells[1])
    here = ["--out", str(tmp_path / "here"), "--results", str(tmp_path / "there/results")]
    assert main([*BASE, *here, "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert "3 x stage 1; 3 x evaluation" in text and re.search("joint_1stage/seed0 +done", text)


@pytest.mark.usefixtures("simulator")
def test_a_report_is_made_of_what_is_there(tmp_path, capsys):
    argv = [*BASE, "--out", str(tmp_path / "out")]
    study = plan(argv).study
    study.prepare()
    finish(study, study.cells[0])
    assert main([*argv, "--report"]) == 0
    assert "0 of 1 seeds" in capsys.readouterr().out
    assert {path.name for path in study.folder.iterdir()} >= {"table.csv", "table.md", "chart.png"}


@pytest.mark.usefixtures("simulator")
def test_two_ablations_do_not_share_a_folder(tmp_path, capsys):
    with open(tmp_path / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert main([*BASE, "--out", str(tmp_path)]) == 2
    assert "another ablation is running" in capsys.readouterr().err


@pytest.mark.usefixtures("simulator")
def test_sizes_come_from_the_preset_and_the_command_line_goes_over_them(tmp_path):
    argv = "--grid table2 --config ablate_cpu --gpus cpu --jobs 2 --vla-iter 7 --eval-episodes 3".split()
    planned = plan([*argv, "--out", str(tmp_path)])
    steps = {cell.row.stages: cell.config.max_iterations for cell in planned.study.cells}
    assert steps == {1: 7, 2: 7} and planned.study.sizes.episodes == 3 and planned.study.sizes.image_size == 96
    assert planned.slots == ["cpu", "cpu"] and planned.recording.image_size == 96


@pytest.mark.usefixtures("simulator")
def test_the_claim_is_tested_with_equal_samples_on_demonstrations_that_may_give_the_target_away(tmp_path, capsys):
    argv = "--grid claim --config blocks --gpus cpu --va-iter 5 --vla-iter 20".split()
    even = plan([*argv, "--out", str(tmp_path)])
    given = plan([*argv, "--out", str(tmp_path), "--demo-flags", "--nearest 0.95"])
    steps = {cell.row.name: cell.config.max_iterations for cell in given.study.cells}
    assert steps["frozen_1stage"] == 25 and steps["frozen_1stage_short"] == steps["frozen_2stage"] == 20
    train, test = (step.command("cpu") for step in given.recording.steps(tmp_path))
    assert train[-2:] == ["--nearest", "0.95"] and "--nearest" not in test, "targets are judged as they are drawn"
    assert given.recording.settings["train_flags"] == ["--nearest", "0.95"]
    assert "train_flags" not in even.recording.settings
    assert main([*argv, "--out", str(tmp_path), "--demos", str(tmp_path), "--demo-flags", "--nearest 0.95"]) == 2
    assert "--demo-flags are of demonstrations that are recorded" in capsys.readouterr().err


@pytest.mark.usefixtures("simulator")
def test_the_data_set_says_in_which_world_demonstrations_are_recorded_and_policies_run(tmp_path, capsys):
    argv = ["--grid", "table2", "--gpus", "cpu", "--out", str(tmp_path)]
    planned = plan([*argv, "--config", "blocks"])
    assert planned.study.evaluation == "blocks" and planned.study.sizes.image_size == 128
    assert "examples.blocks.record" in planned.recording.steps(tmp_path)[0].command("cpu")
    assert plan([*argv, "--config", "ablate_cpu"]).study.evaluation == "pickplace"
    assert main([*argv, "--config", "finetune_aloha_pp"]) == 2
    assert "--evaluation is missing: AlohaPickPlace come from no simulator" in capsys.readouterr().err


def test_a_missing_simulator_is_said_before_anything_is_trained(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(ablate, "_has_simulator", lambda: False)
    assert main([*BASE, "--out", str(tmp_path)]) == 2
    assert "the simulator is not installed: run bash scripts/setup.sh, or use --demos" in capsys.readouterr().err
