"""Command lines that complain in one line, and bars that suit a terminal as well as a log."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")


class CommandLineError(ValueError):
    """A flag that does not exist or whose value does not fit."""


class Parser(argparse.ArgumentParser):
    """Raises :class:`CommandLineError` where argparse prints its usage and ends the process."""

    def error(self, message: str):
        raise CommandLineError(f"{message}; --help lists the flags")


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check_writable(place: Path, flag: str) -> None:
    """Say so before long work where its result cannot be written.

    Args:
        place: folder that is there or will be made; of a file, the folder that it goes to.
        flag: that names it.
    Raises:
        CommandLineError: nothing can be written there, or the disk is full.
    """
    there = next(parent for parent in (place.absolute(), *place.absolute().parents) if os.path.lexists(parent))
    try:
        with tempfile.TemporaryFile(dir=there) as file:
            file.write(bytes(4096))
            file.flush()
    except OSError as error:
        raise CommandLineError(
            f"{flag} {place} cannot be written to ({there}: {error.strerror or error}); name another place"
        ) from error


def bar(iterable=None, **options) -> tqdm:
    """``tqdm``'s bar on stderr, several times a second on a terminal; a log gets a line every half minute."""
    return tqdm(iterable, **{"mininterval": 0.2 if sys.stderr.isatty() else 30.0, **options})


def parse(
    into: type[T], argv: Sequence[str], prog: str, description: str, default: T | None = None, config: tuple = ()
) -> T:
    """An instance of the dataclass ``into`` from command-line arguments; ``--help`` prints and exits.

    Args:
        into: the dataclass; every field is a flag.
        argv: the arguments.
        prog: the command, as its help shows it.
        description: what it does.
        default: values of flags that are not given; None: the fields' own defaults.
        config: markers of ``tyro.conf``.
    Raises:
        CommandLineError: an unknown flag, a missing one, or a value of the wrong type, in one line.
    """
    import tyro  # dear to import, and programs without flags of a dataclass share this file

    wants_help = any(argument in ("-h", "--help") for argument in argv)
    values = {} if default is None else {"default": default}
    said = io.StringIO()
    try:
        # tyro draws a box around its complaints; users get the sentence in it.
        with contextlib.nullcontext() if wants_help else contextlib.redirect_stderr(said):
            return tyro.cli(into, args=list(argv), prog=prog, description=description, config=config, **values)
    except BrokenPipeError:  # who reads the help has seen enough; Python would complain once more at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except SystemExit as stop:
        if stop.code in (0, None):
            sys.exit(0)
        # What the dataclass itself complains of is told with its name, which users have never heard of.
        raise CommandLineError(_sentence(said.getvalue()).removeprefix(f"{into.__name__}: ")) from None


def _sentence(box: str) -> str:
    plain = re.sub(r"\x1b\[[0-9;]*m", "", box)
    # Borders are boxes, or spaces and hyphens where the terminal has no boxes.
    lines = [line.strip("│╭╮╰╯─| ") for line in plain.splitlines()]
    lines = [line for line in lines if line and set(line) != {"-"}]
    lines = lines[1:]  # without the title, which the text repeats
    kept = [line for line in lines if line and not line.lower().startswith(("parsing error", "for full helptext"))]
    unknown = re.match(r"Unrecognized options: (.*?)(?: Perhaps you meant:.*?(--[\w-]+).*)?$", " ".join(kept))
    if unknown is not None:
        words, close = unknown.groups()
        flags = [word for word in words.split(", ") if word.startswith("-")]  # the others may be their values
        what = f"unknown flag {', '.join(flags)}" if flags else f"{words} belongs to no flag"
        return what + (f"; did you mean {close}?" if close else "; --help lists the flags")
    text = re.sub(r"^.*?Error parsing ", "", " ".join(kept))
    return re.split(r" (?:Argument|Required) helptext", text)[0] or "the command line does not parse; see --help"
