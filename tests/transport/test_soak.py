"""Many calls: nothing grows."""

from __future__ import annotations

import os

import numpy as np
import pytest

from shm_transport import connection_info, get_shm_proxy
from shm_transport.segments import DIRECTORY, PREFIX
from tests.transport.conftest import running_service, wait_until
from tests.transport.test_calls import observation


def resident_mb(pid: int) -> float:
    """Memory of a process that is not shared with others."""
    with open(f"/proc/{pid}/statm") as file:
        resident, shared = map(int, file.read().split()[1:3])
    return (resident - shared) * os.sysconf("SC_PAGE_SIZE") / 1e6


@pytest.mark.slow
def test_twenty_thousand_calls_and_three_hundred_sessions_leave_everything_as_it_was():
    frame = observation()
    with running_service() as service, get_shm_proxy(service.uri) as robot:
        for _ in range(200):
            robot.echo(frame)
        before = {"here": resident_mb(os.getpid()), "there": resident_mb(service.pid), **robot.resources()}
        segments = connection_info(robot)["segments_created"]
        for _ in range(20_000):
            robot.echo(frame)
        for _ in range(300):
            with get_shm_proxy(service.uri) as another:
                another.echo(np.zeros(1 << 16, np.uint8))
        wait_until(lambda: robot.resources()["fds"] <= before["fds"] + 2, 15)  # the last sessions are being closed
        after = {"here": resident_mb(os.getpid()), "there": resident_mb(service.pid), **robot.resources()}
        assert connection_info(robot)["segments_created"] == segments
        assert after["fds"] <= before["fds"] + 2 and after["threads"] <= before["threads"] + 4, (before, after)
        assert after["here"] < before["here"] + 10 and after["there"] < before["there"] + 10, (before, after)
        assert not [name for name in os.listdir(DIRECTORY) if name.startswith(f"{PREFIX}{service.pid}-")]
        print(before, after)
