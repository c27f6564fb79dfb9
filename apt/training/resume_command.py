"""The command line that continues a run, complete, to be run as it is printed."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from pathlib import Path

from data_utils.data_loc import LOCATION_VARIABLE

REPOSITORY = Path(__file__).resolve().parents[2]
_WITH_VALUE = ("--stage", "--va-name", "--vla-name", "--va-conti", "--vla-conti")


def launcher(command: str) -> list[str]:
    """How ``train`` or ``finetune`` is called here: by its script in a clone, else by the installed command."""
    script = REPOSITORY / "scripts" / f"{command}.sh"
    if not script.is_file():
        return ["apt-vla", command]
    return ["bash", str(script.relative_to(REPOSITORY) if Path.cwd() == REPOSITORY else script)]


def continue_command(command: str, argv: Sequence[str], stage: int, names: dict[int, str], saved: bool) -> str:
    """The line that goes on where a stage stopped.

    Args:
        command: ``train`` or ``finetune``; argv: what it was called with.
        stage: the one that stopped; names: of all runs that were asked for, by stage.
        saved: whether there is a checkpoint to resume from; else the stage starts anew.
    """
    flags = {0: ("--va-conti", "--va-name"), 1: ("--vla-conti", "--vla-name")}
    own = ["--stage", "both" if stage == 0 and 1 in names else str(stage)]
    if stage == 1 and not saved and 0 in names:
        own += ["--va-name", names[0]]  # where it starts from
    own += [flags[stage][0 if saved else 1], names[stage]]
    if stage == 0 and 1 in names:
        own += ["--vla-name", names[1]]
    return with_environment([*launcher(command), *_without(argv, _WITH_VALUE), *own])


def continue_stage(argv: Sequence[str]) -> str:
    """The line for a stage that was started by ``python -m apt.train`` with ``argv`` itself."""
    return with_environment(["python", "-m", "apt.train", *_without(argv, ("--resume",)), "--resume", "True"])


def _without(argv: Sequence[str], flags: Sequence[str]) -> list[str]:
    kept, skip = [], False
    for argument in argv:
        if skip:
            skip = False
        elif argument in flags:
            skip = True
        elif argument.split("=", 1)[0] not in flags:
            kept.append(argument)
    return kept


def with_environment(words: list[str]) -> str:
    """A line for a shell that finds the data where this process does."""
    location = os.environ.get(LOCATION_VARIABLE)
    prefix = f"{LOCATION_VARIABLE}={shlex.quote(os.path.abspath(location))} " if location else ""
    return prefix + shlex.join(words)
