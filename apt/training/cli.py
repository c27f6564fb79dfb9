"""``TrainConfig`` from a command line: a preset, then flags over its fields."""

from __future__ import annotations

import dataclasses
import difflib

import tyro

from apt.configs import TrainConfig
from apt.presets import CONFIGS, get_config
from data_utils.cli import CommandLineError, parse


def parse_train_config(argv: list[str]) -> TrainConfig:
    """``--config NAME`` chooses the preset (default: debug), every other flag is a field of :class:`TrainConfig`.

    Raises:
        CommandLineError: an unknown flag or a value of the wrong type, in one line.
        ConfigError: an unknown preset, or fields that contradict each other.
    """
    argv = list(argv)
    name = "debug"
    for index, argument in enumerate(argv):
        if argument == "--config" or argument.startswith("--config="):
            if "=" not in argument and index + 1 == len(argv):
                raise CommandLineError("--config needs the name of a preset")
            name = argument.split("=", 1)[1] if "=" in argument else argv[index + 1]
            del argv[index : index + (1 if "=" in argument else 2)]
            break
    preset = get_config(name)
    _check_flags(argv)
    presets = ", ".join(sorted(CONFIGS))
    description = (
        f"Train one stage. --config NAME chooses a preset (default: debug, a few steps of a tiny model): {presets}. "
        "--dry-run says what the run would take. Defaults below are the chosen preset's."
    )
    return parse(
        TrainConfig,
        argv,
        prog="python -m apt.train [--config NAME]",
        description=description,
        default=preset,
        config=(tyro.conf.FlagConversionOff,),
    )


def _check_flags(argv: list[str]) -> None:
    known = {field.name for field in dataclasses.fields(TrainConfig)}
    for argument in argv:
        if argument.startswith("--") and argument != "--help":
            flag = argument[2:].split("=", 1)[0].replace("-", "_")
            if flag not in known:
                close = _nearest(flag, known)
                hint = f"; did you mean --{close}?" if close else "; --help lists them"
                raise CommandLineError(f"unknown flag {argument.split('=', 1)[0]}{hint}")


def _nearest(flag: str, known: set[str]) -> str | None:
    """The flag that was meant; of long ones often only the beginning is typed."""
    beginnings = {name[: len(flag)]: name for name in sorted(known, reverse=True)}
    found = difflib.get_close_matches(flag, [*known, *beginnings], n=1, cutoff=0.7)
    return beginnings.get(found[0], found[0]) if found else None
