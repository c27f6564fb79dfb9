"""Fixtures shared by the suite."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test needs a network; without this, a missing model is asked for
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # spinning threads slow the other processes of a test
# Of the suite's processes, and of those that tests start: together no more than there are cores, which would slow all.
os.environ.setdefault(
    "OMP_NUM_THREADS",
    str(max(1, min(2, (os.cpu_count() or 1) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))))),
)

import pytest
import torch

from examples.errors import SimulatorError
from examples.headless import select_gl
from shm_transport.segments import DIRECTORY, PREFIX, available, reclaim_stale, stale_segments
from tests.synthetic import write_episode

with contextlib.suppress(SimulatorError):  # tests of a simulator skip then
    select_gl()  # before a test of kinematics imports MuJoCo, which then could not render any more

GOLDEN = Path(__file__).parent / "golden"
#: recorded, since SVT-AV1's encoder makes the process that calls it real-time (as root), and its threads then starve
#: all others; it wrote them with preset 12: av1_numbers.mp4 with crf 20 (the frames of test_video_readers' STEADY),
#: av1_front.mp4 with crf 10 (the front camera of test_lerobot_conversion's first episode)
VIDEOS = Path(__file__).parent / "videos"


@pytest.fixture(scope="session", autouse=True)
def _threads():
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


@pytest.fixture(autouse=True)
def _ordinary_scheduling():
    """No test leaves its process real-time, or in another way scheduled before the rest."""
    policy = getattr(os, "sched_getscheduler", lambda pid: None)
    before = policy(0)
    yield
    assert policy(0) == before, "a library changed how this process is scheduled"


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Torch works with one thread meanwhile."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session", autouse=True)
def _no_shared_memory_is_left():
    """After the whole suite /dev/shm holds no segment of this process or of one that has died."""
    reclaim_stale()  # what something else may have left before
    yield
    deadline = time.monotonic() + 5.0  # another suite on this machine may be killing a client of its own just now
    while (left := stale_segments()) and time.monotonic() < deadline:
        time.sleep(0.2)
    mine = [name for name in os.listdir(DIRECTORY) if name.startswith(f"{PREFIX}{os.getpid()}-")] if available() else []
    assert not left and not mine, f"shared memory is left: {left + mine}"


@pytest.fixture(scope="session")
def episode_dir(tmp_path_factory) -> Path:
    """Six synthetic episodes for ``PickPlaceCan``."""
    folder = tmp_path_factory.mktemp("episodes")
    for index in range(6):
        write_episode(folder / f"ep{index:03d}.h5", index)
    return folder


@pytest.fixture(scope="session")
def data_loc(tmp_path_factory, episode_dir) -> Path:
    """A location file that knows ``PickPlaceCan`` alone."""
    path = tmp_path_factory.mktemp("loc") / "data_loc.yaml"
    path.write_text(f"default:\n  PickPlaceCan: {episode_dir}\n")
    return path


@pytest.fixture
def located(monkeypatch, data_loc) -> Path:
    """``APT_DATA_LOC`` points at the synthetic episodes."""
    monkeypatch.setenv("APT_DATA_LOC", str(data_loc))
    return data_loc
