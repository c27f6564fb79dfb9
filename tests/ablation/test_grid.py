"""What a grid expands to, and which runs its cells share."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from apt.ablation.grid import GRIDS, STAGE_1_ONLY, Grid, Row, expand, files_digest, learned_fields, select_rows
from apt.ablation.study import changed_fields
from apt.configs import TrainConfig
from apt.model.objectives.registry import PREDICTIONS
from apt.presets import CONFIGS, UNIT_SCALE
from apt.training.cli import parse_train_config
from tests.ablation.helpers import ITERATIONS, make_study
from train_utils.errors import ConfigError


def cells_of(grid: str, **fields):
    return expand(GRIDS[grid], dataclasses.replace(CONFIGS["debug"], **fields), 2, ITERATIONS)


def test_table_2_has_its_four_recipes_with_each_seed():
    cells = cells_of("table2")
    assert [(c.row.name, c.seed) for c in cells] == [
        (name, seed) for seed in range(2) for name in ("ki_1stage", "joint_1stage", "ki_2stage", "joint_2stage")
    ]
    for cell in cells:
        assert cell.config.vlm_finetune_mode == ("frozen" if cell.row.columns["KI"] else "full")
        assert cell.config.knowledge_insulation == cell.row.columns["KI"]
        assert (cell.prior is not None) == cell.row.columns["2-Stage"]
        assert cell.config.seed == cell.seed and cell.config.train_stage == 1


def test_the_claims_rows_see_as_many_samples_in_one_stage_as_in_two_but_for_the_short_one():
    cells = {cell.row.name: cell for cell in cells_of("claim") if cell.seed == 0}
    assert {name: cell.config.vlm_finetune_mode for name, cell in cells.items()} == {
        "joint_1stage": "full",
        "frozen_1stage": "frozen",
        "frozen_1stage_short": "frozen",
        "frozen_2stage": "frozen",
        "joint_2stage": "full",
    }
    assert cells["frozen_1stage_short"].config.max_iterations == ITERATIONS.vla
    assert cells["frozen_1stage"].config.max_iterations == ITERATIONS.one_stage
    shared = cells["frozen_2stage"].prior.settings
    assert shared == cells["joint_2stage"].prior.settings, "both start from one prior"


def test_rows_differ_in_what_their_columns_say_and_nothing_else_is_named_twice():
    for grid in GRIDS.values():
        assert len({row.name for row in grid.rows}) == len(grid.rows)
        shown = [tuple(row.columns.items()) for row in grid.rows]
        assert len(set(shown)) == len(shown)
        assert len({tuple(row.columns) for row in grid.rows}) == 1


def test_architectures_are_compared_with_one_stage_and_with_two():
    rows = GRIDS["architectures"].rows
    assert [(row.changes["arch"], row.stages) for row in rows] == [
        (arch, stages) for arch in ("pi", "gr00t", "apt") for stages in (1, 2)
    ]


def test_fusion_crosses_how_features_enter_with_the_step_embedding():
    changes = [(row.changes["arch"], row.changes["action_step_embedding"]) for row in GRIDS["fusion"].rows]
    assert sorted(changes) == sorted((arch, steps) for arch in ("apt", "token_insertion") for steps in (True, False))
    assert all(row.stages == 2 for row in GRIDS["fusion"].rows)


def test_objectives_are_compared_on_held_out_episodes_with_each_prediction_they_can_make():
    cells = [cell.config for cell in cells_of("objectives")[: len(GRIDS["objectives"].rows)]]
    assert {(c.objective, c.vla_config().prediction) for c in cells} == {
        (objective, prediction) for objective in PREDICTIONS for prediction in PREDICTIONS[objective]
    }
    assert {c.action_scale for c in cells} == {None, UNIT_SCALE} and all(c.eval_split == 0.1 for c in cells)
    released = next(cell for cell in cells_of("objectives") if cell.row.name == "ddim_epsilon_metres").config
    assert "None" in changed_fields(released, CONFIGS["debug"])


def test_one_stage_cells_train_as_long_as_they_are_told():
    steps = {cell.row.stages: cell.config.max_iterations for cell in cells_of("table2")}
    assert steps == {1: ITERATIONS.one_stage, 2: ITERATIONS.vla}


def test_cells_that_differ_in_stage_1_alone_share_a_prior_per_seed_and_others_do_not(tmp_path):
    study = make_study(tmp_path, "table2")
    folders = {cell.name: study.prior_folder(cell.prior) for cell in study.cells if cell.prior is not None}
    assert folders["ki_2stage/seed0"] == folders["joint_2stage/seed0"] != folders["ki_2stage/seed1"]
    other = make_study(tmp_path, "table2", max_lr=2e-4)
    assert other.prior_folder(other.cells[2].prior) != study.prior_folder(study.cells[2].prior)
    moved = make_study(tmp_path, "table2", data={"episodes": 7})
    assert moved.prior_folder(moved.cells[2].prior) != study.prior_folder(study.cells[2].prior)


def test_a_prior_has_the_defaults_of_what_stage_0_does_not_read():
    prior = next(c for c in cells_of("table2", vlm_lr=1e-5) if c.row.name == "joint_2stage").prior.config
    defaults = TrainConfig()
    known = {field.name for field in dataclasses.fields(TrainConfig)}
    assert prior.train_stage == 0 and prior.max_iterations == ITERATIONS.va
    assert all(getattr(prior, name) == getattr(defaults, name) for name in STAGE_1_ONLY & known)


def test_where_and_how_fast_a_run_trains_is_not_part_of_what_it_learns():
    config = CONFIGS["debug"]
    elsewhere = dataclasses.replace(config, ckpt_dir="/x", log_dir="/y", device="cpu", workers=3, log_interval=7)
    assert learned_fields(elsewhere) == learned_fields(config)
    assert learned_fields(dataclasses.replace(config, bs=5)) != learned_fields(config)


def test_the_command_line_of_a_cell_gives_its_configuration_back():
    changed = {"dataset_weights": (1.0,), "vlm_lr": 1e-5, "image_size": None}
    for cell in [*cells_of("table2", **changed), *cells_of("objectives", **changed)]:
        argv = ["--config", "debug", *changed_fields(cell.config, CONFIGS["debug"])]
        assert learned_fields(parse_train_config(argv)) == learned_fields(cell.config)


def test_a_row_that_cannot_be_configured_is_named():
    rows = (Row("odd", 1, {"Odd": True}, "odd", {"bs": 0}),)
    with pytest.raises(ConfigError, match="grid toy, row odd: bs is 0"):
        expand(Grid("toy", "Toy", rows), CONFIGS["debug"], 1, ITERATIONS)
    rows = (Row("odd", 1, {"Odd": True}, "odd", {"no_such_field": 0}),)
    with pytest.raises(ConfigError, match="row odd: .*no_such_field"):
        expand(Grid("toy", "Toy", rows), CONFIGS["debug"], 1, ITERATIONS)


def test_unknown_rows_are_refused_with_the_known_ones():
    assert [row.name for row in select_rows(GRIDS["table2"], ["joint_2stage"]).rows] == ["joint_2stage"]
    with pytest.raises(ValueError, match="no row ki; it has ki_1stage, joint_1stage, ki_2stage, joint_2stage"):
        select_rows(GRIDS["table2"], ["ki"])


def test_data_are_told_apart_by_their_files(tmp_path: Path):
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "episode_00000.hdf5").write_bytes(b"1234")
    before = files_digest(tmp_path)
    (tmp_path / "train" / ".index").write_bytes(b"made by a reader")
    assert files_digest(tmp_path) == before
    (tmp_path / "train" / "episode_00001.hdf5").write_bytes(b"1234")
    assert files_digest(tmp_path) != before
