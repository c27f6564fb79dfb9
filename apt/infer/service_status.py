"""How a running service is doing: counts and latencies as plain data, and as a table for people."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from apt.infer.plan import Timing

STAGES = tuple(field.name for field in dataclasses.fields(Timing))
PERCENTILES = (50, 90, 99)
RATE_WINDOW_S = 30.0
_RECENT = 2000  # queries that percentiles are taken of


class QueryLog:
    """Counts queries and remembers the recent ones. Thread-safe.

    Args:
        clock: seconds, increasing.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._recent = np.empty((_RECENT, 1 + len(STAGES)))  # a ring: moment and stages
        self._started = clock()
        self.answered = 0
        self.failed = 0

    def answer(self, timing: Timing) -> None:
        with self._lock:
            self._recent[self.answered % _RECENT] = (self._clock(), *dataclasses.astuple(timing))
            self.answered += 1

    def failure(self) -> None:
        with self._lock:
            self.failed += 1

    def summary(self) -> dict[str, Any]:
        """Plain data: ``answered``, ``failed``, ``per_second`` over the last half minute, ``last_s_ago`` (None before
        the first), and ``latency_s``: per stage ``{"p50": ..., "p90": ..., "p99": ...}`` of the recent queries."""
        with self._lock:
            now, answered, failed = self._clock(), self.answered, self.failed
            recent = self._recent[:answered].copy()
        moments = recent[:, 0]
        window = min(RATE_WINDOW_S, max(now - self._started, 1e-9))
        in_window = int((now - moments <= window).sum())
        if in_window == _RECENT:  # older ones of the window are forgotten
            window = max(now - moments.min(), 1e-9)
        return {
            "answered": answered,
            "failed": failed,
            "per_second": in_window / window,
            "last_s_ago": float(now - moments.max()) if answered else None,
            "latency_s": percentiles(recent[:, 1:]),
        }


def percentiles(seconds: np.ndarray) -> dict[str, dict[str, float]]:
    """Per stage the median and the tail of (queries, stages); empty for no queries."""
    if not len(seconds):
        return {}
    values = np.percentile(seconds, PERCENTILES, axis=0)  # (percentiles, stages)
    return {
        stage: {f"p{p}": float(values[row, column]) for row, p in enumerate(PERCENTILES)}
        for column, stage in enumerate(STAGES)
    }


def status_line(status: dict[str, Any]) -> str:
    """One line: what the service prints now and then."""
    queries = status["queries"]
    total = queries["latency_s"].get("total")
    latency = f", p50 {1e3 * total['p50']:.0f} ms, p99 {1e3 * total['p99']:.0f} ms" if total else ""
    failed = f", {queries['failed']} failed" if queries["failed"] else ""
    clients = len(status["clients"])
    return (
        f"{clients} client{'' if clients == 1 else 's'}, {queries['per_second']:.1f} queries/s{latency}; "
        f"{queries['answered']} queries since the start{failed}"
    )


def status_report(status: dict[str, Any]) -> str:
    """Everything, for ``--status``."""
    checkpoint, queries = status["checkpoint"], status["queries"]
    lines = [
        f"{status['uri']}: up {duration(status['uptime_s'])}, process {status['pid']} on {status['host']}, "
        f"version {status['version']}, {status['device']}",
        f"checkpoint {checkpoint['name']}, sha256 {checkpoint['sha256'][:12]}",
        *status["contract_text"],
        "",
        f"{queries['answered']} queries, {queries['failed']} failed, {queries['per_second']:.1f} per second now",
    ]
    if queries["latency_s"]:
        lines += ["", *_table(("stage (ms)", *(f"p{p}" for p in PERCENTILES)), _latency_rows(queries["latency_s"]))]
    lines += ["", "no clients"] if not status["clients"] else [
        "",
        *_table(("client", "host", "connected", "queries", "failed", "per second", "last query", "running"),
                map(_client_row, status["clients"])),
    ]  # fmt: skip
    return "\n".join(lines)


def duration(seconds: float) -> str:
    """``12 s``, ``3 min 20 s``, ``5 h 12 min``, ``2 d 3 h``"""
    whole = int(seconds)
    for size, unit, smaller, smaller_unit in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            return f"{whole // size} {unit} {whole % size // smaller} {smaller_unit}"
    return f"{whole} s"


def _latency_rows(latency: dict[str, dict[str, float]]) -> list[tuple[str, ...]]:
    return [(stage, *(f"{1e3 * value:.1f}" for value in values.values())) for stage, values in latency.items()]


def _client_row(client: dict[str, Any]) -> tuple[str, ...]:
    last = client["last_s_ago"]
    return (
        str(client["id"]),
        client["host"],
        duration(client["connected_s"]),
        str(client["answered"]),
        str(client["failed"]),
        f"{client['per_second']:.1f}",
        "none" if last is None else f"{duration(last)} ago",
        client["running"] or "-",
    )


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> list[str]:
    """Aligned columns, the first to the left and the others to the right."""
    table = [head, *rows]
    widths = [max(len(row[column]) for row in table) for column in range(len(head))]
    return [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in table
    ]
