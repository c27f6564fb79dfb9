"""Stopping between steps: signals become a wish, and ranks agree on the step after which all of them stop."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Iterator

import torch

from train_utils.backend import Backend

REACTION_S = 2.0  # within which a wish is seen, or within one step where that takes longer
_MOST_STEPS = 10  # between two exchanges


class StopWish:
    """Whether this process was told to stop, and whether any rank was.

    Ranks exchange that every few steps, so that none waits for the others in each: after as many as take
    ``REACTION_S`` on the slowest rank, 10 at most.
    """

    def __init__(self) -> None:
        self._signal: int | None = None
        self._steps, self._until_exchange = 0, 1
        self._began = time.monotonic()

    @contextlib.contextmanager
    def catching(self) -> Iterator[None]:
        """Context in which SIGTERM and SIGINT are remembered.

        A second Ctrl-C acts at once. A second SIGTERM does nothing: job managers send it to every process of a job, so
        that it arrives from several sides.
        """

        def remember(number: int, _frame) -> None:
            if self._signal == signal.SIGINT == number:
                raise KeyboardInterrupt
            self._signal = number

        previous = {number: signal.signal(number, remember) for number in (signal.SIGTERM, signal.SIGINT)}
        self._began = time.monotonic()
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def agreed(self, backend: Backend) -> bool:
        """Whether to stop now; called by all ranks after each step, and the same on all."""
        wished = self._signal is not None
        if backend.world_size == 1:
            return wished
        self._steps += 1
        if self._steps < self._until_exchange:
            return False
        seconds = (time.monotonic() - self._began) / self._steps
        wished, seconds = backend.max(torch.tensor([float(wished), seconds], device=backend.device)).tolist()
        self._until_exchange = max(1, min(_MOST_STEPS, int(REACTION_S / max(seconds, 1e-6))))
        self._steps, self._began = 0, time.monotonic()
        return bool(wished)
