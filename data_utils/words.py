"""What programs say of numbers, endings, errors and differences."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator

_SHOWN = 5  # differences that are told of many


def counted(number: int, noun: str) -> str:
    """A number of things, "1 episode" or "2 episodes"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def one_line(said: object, length: int | None = 200) -> str:
    """A text or what an error says, line breaks and all, as one line of at most ``length`` characters (None: whole)."""
    return " ".join(str(said).split())[:length]


def ending(code: int | None) -> str:
    """How a process ended, from its exit code, to follow "the process"."""
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        return f"was killed by {name}{' (out of memory?)' if name == 'SIGKILL' else ''}"
    return f"ended with exit code {code}"


def describe_differences(begun: object, now: object) -> str:
    """``path: old -> new`` for every innermost value that differs between two JSON values, the first few of them.

    An empty text where nothing differs.
    """
    differing = list(_differences(begun, now, ""))
    more = f"; and {len(differing) - _SHOWN} more" if len(differing) > _SHOWN else ""
    return "; ".join(differing[:_SHOWN]) + more


def _differences(old: object, new: object, where: str) -> Iterator[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        for name in sorted({*old, *new}):
            yield from _differences(old.get(name), new.get(name), f"{where}.{name}".lstrip("."))
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for index, (one, other) in enumerate(zip(old, new, strict=True)):
            yield from _differences(one, other, f"{where}[{index}]")
    elif old != new:
        texts = [value if isinstance(value, str) else json.dumps(value) for value in (old, new)]
        begin = max(0, len(os.path.commonprefix(texts)) - 20)  # long values are cut around their first difference
        yield f"{where}: {' -> '.join(_shown(text, begin) for text in texts)}"


def _shown(text: str, begin: int) -> str:
    if len(text) <= 100:
        return text
    return f"{'...' if begin else ''}{text[begin : begin + 100]}{'...' if len(text) > begin + 100 else ''}"


def format_duration(seconds: float) -> str:
    """``1:02:03``"""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
