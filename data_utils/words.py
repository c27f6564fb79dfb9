"""What programs say of numbers and endings."""

from __future__ import annotations

import signal


def ending(code: int | None) -> str:
    """How a process ended, from its exit code, to follow "the process"."""
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        return f"was killed by {name}{' (out of memory?)' if name == 'SIGKILL' else ''}"
    return f"ended with exit code {code}"


def counted(number: int, noun: str) -> str:
    """A number of things, "1 episode" or "2 episodes"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
