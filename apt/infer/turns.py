"""One at a time, in the order of asking: several sessions on one policy."""

from __future__ import annotations

import threading
from collections import deque


class FairLock:
    """A lock that is handed to whoever has waited longest. ``threading.Lock`` lets a busy thread take it again and
    again while others starve. A context manager; not reentrant."""

    def __init__(self) -> None:
        self._mutex = threading.Lock()  # guards what follows
        self._held = False
        self._waiting: deque[threading.Lock] = deque()

    def acquire(self) -> None:
        with self._mutex:
            if not self._held:
                self._held = True
                return
            turn = threading.Lock()
            turn.acquire()
            self._waiting.append(turn)
        try:
            turn.acquire()  # released by whoever holds the lock before
        except BaseException:  # interrupted: step out of the queue, or pass on what was just handed over
            with self._mutex:
                given = turn not in self._waiting
                if not given:
                    self._waiting.remove(turn)
            if given:
                self.release()
            raise

    def release(self) -> None:
        with self._mutex:
            if self._waiting:
                self._waiting.popleft().release()
            else:
                self._held = False

    def __enter__(self) -> "FairLock":
        self.acquire()
        return self

    def __exit__(self, *_) -> None:
        self.release()
