"""SIGTERM and SIGINT as one wish to end, however many come and whenever."""

from __future__ import annotations

import signal
import threading
from typing import Any


class EndWish:
    """A context in which SIGTERM and SIGINT mean that the program is to end.

    While ``interrupting`` the first raises KeyboardInterrupt, to end what takes long; all others are remembered alone,
    so that none disturbs the cleaning up after the first. The handler takes no lock: one that does may meet itself,
    where a second signal comes while it holds the lock. Outside the main thread, which alone gets signals, it does
    nothing.

    When the context is left with the wish fulfilled, signals stay without effect: the program is about to be gone.
    """

    def __init__(self) -> None:
        self.wished = False
        self.interrupting = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "EndWish":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *error: object) -> None:
        self.interrupting = False
        if not self.wished:
            for number, handler in self._before.items():
                signal.signal(number, handler)

    def _remember(self, number: int, frame: Any) -> None:
        first, self.wished = not self.wished, True
        if first and self.interrupting:
            raise KeyboardInterrupt
