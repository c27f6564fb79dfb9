"""Numbers of a run between two log lines: summed on the device, read once."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import torch


class MetricWindow:
    """Means of device scalars over the steps since the last ``flush``; adding one never waits for the device."""

    def __init__(self) -> None:
        self._sums: dict[str, torch.Tensor] = {}
        self._count = 0

    def add(self, values: dict[str, torch.Tensor]) -> None:
        for name, value in values.items():
            value = value.detach().float()
            # A skipped, non-finite step would poison the mean; it is counted elsewhere.
            value = torch.nan_to_num(value, nan=0.0, posinf=0.0, neginf=0.0)
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._count += 1

    def flush(self, reduce) -> dict[str, float]:
        """Means over steps and, by ``reduce`` (a tensor to its mean over ranks), over ranks."""
        if not self._count:
            return {}
        values = reduce(torch.stack(list(self._sums.values())) / self._count).tolist()
        means = dict(zip(self._sums, values, strict=True))
        self._sums, self._count = {}, 0
        return means


class Stopwatch:
    """Shares of wall time spent waiting for data, and steps per second, between two log lines."""

    def __init__(self) -> None:
        self._restart()

    def _restart(self) -> None:
        self._start = time.perf_counter()
        self._waited = 0.0
        self._steps = 0

    def waited(self, seconds: float) -> None:
        self._waited += seconds

    def step(self) -> None:
        self._steps += 1

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time that passes within does not count."""
        began = time.perf_counter()
        yield
        self._start += time.perf_counter() - began

    def flush(self) -> tuple[float, float]:
        """(seconds per step, share of time that was waiting for data)."""
        elapsed = max(time.perf_counter() - self._start, 1e-9)
        result = elapsed / max(self._steps, 1), self._waited / elapsed
        self._restart()
        return result
