"""A service of openpi's protocol in a process of its own, and clients that speak it without this library's decoder."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
from websockets.sync.client import connect

from apt.infer.planner import TrajPlanner
from tests.service.helpers import STEPS, wait_until_ready
from tests.transport.conftest import Process, running

PROMPT = "reach for the red square"


@contextlib.contextmanager
def serving(checkpoint: Path, *flags: str) -> Iterator[Process]:
    """``python -m apt.infer.openpi_service``, ready, at ``process.url``."""
    arguments = ["--ckpt", str(checkpoint), "--port", "0", "--steps", str(STEPS), *flags]
    with running("-m", "apt.infer.openpi_service", *arguments, env={"OMP_NUM_THREADS": "1"}) as process:
        wait_until_ready(process)
        process.url = re.search(r"ready: (wss?://\S+);", "\n".join(process.lines))[1]
        yield process


@pytest.fixture(scope="package")
def service(checkpoint):
    with serving(checkpoint) as process:
        yield process


class Client:
    """What openpi's own client does, without its limits' absence."""

    def __init__(self, url: str, **options: Any) -> None:
        self.socket = connect(url, compression=None, max_size=None, open_timeout=60, **options)
        self.metadata = msgpack.unpackb(self.socket.recv(), object_hook=as_numpy)

    def infer(self, observation: dict) -> dict:
        self.socket.send(msgpack.packb(observation, default=as_maps))
        reply = self.socket.recv(timeout=120)
        if isinstance(reply, str):
            raise RuntimeError(f"Error in inference server:\n{reply}")
        return msgpack.unpackb(reply, object_hook=as_numpy)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *error: object) -> None:
        self.socket.close()


def as_maps(value: Any) -> Any:
    """numpy's arrays and numbers, as openpi's packer writes them."""
    if isinstance(value, np.ndarray):
        keys = (b"__ndarray__", b"data", b"dtype", b"shape")
        return dict(zip(keys, (True, value.tobytes(), value.dtype.str, value.shape), strict=True))
    return {b"__npgeneric__": True, b"data": value.item(), b"dtype": value.dtype.str}


def as_numpy(found: dict) -> Any:
    if b"__ndarray__" in found:
        return np.frombuffer(found[b"data"], found[b"dtype"]).reshape(found[b"shape"])
    return np.dtype(found[b"dtype"]).type(found[b"data"]) if b"__npgeneric__" in found else found


@pytest.fixture
def client(service):
    with Client(service.url) as client:
        yield client


@pytest.fixture
def local(policy) -> TrajPlanner:
    """What a client should agree with."""
    return TrajPlanner.of_policy(policy, ensemble=0, steps=STEPS)
