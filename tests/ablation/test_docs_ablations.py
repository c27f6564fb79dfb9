"""docs/ablations.md says what there is: its commands parse, its rows and flags exist, its code runs."""

from __future__ import annotations

import dataclasses
import re
import shlex

from apt.ablate import build_parser
from apt.ablation.evaluation import EvaluationSizes
from apt.ablation.grid import GRIDS, Iterations, expand
from apt.ablation.presets import SIZES
from apt.configs import TrainConfig
from apt.presets import CONFIGS
from apt.training.cli import parse_train_config
from tests.training.helpers import REPOSITORY

DOCS = (REPOSITORY / "docs" / "ablations.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", DOCS, re.DOTALL)


def test_every_command_parses_and_names_presets_with_sizes_and_fields_that_exist():
    commands = [line for block in blocks("bash") for line in block.replace("\\\n", " ").splitlines()]
    assert len(commands) == 9
    for command in commands:
        words = shlex.split(command)
        assert words[:3] == ["python", "-m", "apt.ablate"]
        args, fields = build_parser().parse_known_args(words[3:])
        assert args.config in SIZES and args.config in CONFIGS
        parse_train_config(["--config", args.config, *fields])
    inline = set(re.findall(r"`(--[a-z_-]+)", DOCS))
    known = {option for action in build_parser()._actions for option in action.option_strings}
    known |= {f"--{field.name}" for field in dataclasses.fields(TrainConfig)} | {"--field"}
    assert inline <= known
    assert {f"--eval-{field.name.replace('_', '-')}" for field in dataclasses.fields(EvaluationSizes)} <= inline


def test_every_grid_is_described_and_each_row_architecture_is_named():
    for grid in GRIDS.values():
        assert f"| `{grid.name}` |" in DOCS
    for row in GRIDS["architectures"].rows:
        assert f"`{row.changes['arch']}`" in DOCS


def test_the_examples_are_a_grid_that_expands_and_a_function():
    names: dict = {}
    for block in blocks("python"):
        exec(block, names)  # noqa: S102 - the document's own code
    assert len(expand(names["depth"], CONFIGS["debug"], 2, Iterations(1, 1, 1))) == 6
    assert callable(names["judge"])
