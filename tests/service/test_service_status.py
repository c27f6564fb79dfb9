"""What a service says of its queries."""

from __future__ import annotations

import pytest

from apt.infer.plan import Timing
from apt.infer.service_status import QueryLog, duration


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def timing(total: float) -> Timing:
    return Timing(wait=0.0, preprocess=0.0, vlm=total / 2, prefix=0.0, denoise=total / 2, total=total)


def test_percentiles_are_of_the_recent_queries_and_counts_of_all():
    clock = Clock()
    log = QueryLog(clock)
    for number in range(5000):
        clock.now += 0.01
        log.answer(timing(1.0 if number < 3000 else 2.0 + (number % 100) / 100))
    log.failure()
    summary = log.summary()
    assert (summary["answered"], summary["failed"]) == (5000, 1)
    assert summary["latency_s"]["total"]["p50"] == pytest.approx(2.495, abs=0.01)
    assert summary["latency_s"]["vlm"]["p99"] == pytest.approx(1.49, abs=0.01)
    assert summary["per_second"] == pytest.approx(100, rel=0.01)


def test_the_rate_is_that_of_the_last_half_minute():
    clock = Clock()
    log = QueryLog(clock)
    assert log.summary()["last_s_ago"] is None and log.summary()["latency_s"] == {}
    for _ in range(60):
        clock.now += 1.0
        log.answer(timing(0.1))
    assert log.summary()["per_second"] == pytest.approx(1.0, rel=0.05)
    clock.now += 40.0
    summary = log.summary()
    assert summary["per_second"] == 0 and summary["last_s_ago"] == 40.0


@pytest.mark.parametrize(
    "seconds, said", [(5.9, "5 s"), (200, "3 min 20 s"), (18720, "5 h 12 min"), (183600, "2 d 3 h")]
)
def test_durations_read_as_people_say_them(seconds, said):
    assert duration(seconds) == said
