"""Files that are there whole or not at all, whenever a process is killed."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

_TEMPORARY = ".writing"
_OTHERS = ".tmp"  # of copies, videos, and writers of earlier versions


def atomic_write(path: Path, write: Callable[[Path], None]) -> None:
    """Let ``write`` fill a temporary file beside ``path``, flush it to disk, then rename it over ``path``.

    A kill at any moment leaves the old file or the new one. A failed write (disk full) leaves the old one and
    removes the temporary.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}{_TEMPORARY}")
    try:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def write_text(path: Path, text: str) -> None:
    """:func:`atomic_write` of a text, as UTF-8 and with line breaks as they are."""
    atomic_write(path, lambda temporary: temporary.write_text(text, encoding="utf-8", newline=""))


def write_json(path: Path, values: object) -> None:
    """:func:`atomic_write` of what JSON can hold."""
    write_text(path, json.dumps(values, indent=1) + "\n")


def read_json(path: Path) -> Any:
    """Raises ``ValueError`` with the file's name for one that cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def cache_root() -> Path:
    """Where what can be made or fetched again lives: ``$APT_CACHE``, else ``$XDG_CACHE_HOME/apt``, else
    ``~/.cache/apt``."""
    if os.environ.get("APT_CACHE"):
        return Path(os.environ["APT_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "apt"


def remove_leftovers(folder: Path) -> None:
    """Delete temporaries of writers that were killed, in sub-folders too; for whoever writes there alone."""
    for suffix in (_TEMPORARY, _OTHERS):
        for leftover in folder.rglob(f".*{suffix}"):
            leftover.unlink(missing_ok=True)
