"""A service for the tests, run in a process of its own: ``python -m tests.transport.service --ns-port N --name S``.

Its address is printed once it serves.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import threading
import time
from typing import Any

import numpy as np

from shm_transport import dive_into, expose
from shm_transport.end_wish import EndWish
from shm_transport.server import ShmServer


@dive_into
@dataclasses.dataclass
class Pinhole:
    """A dataclass that travels."""

    width: int
    height: int
    K: np.ndarray  # (3, 3)


class CameraMissing(KeyError):
    """An error type that the client does not have."""


class Session:
    """What one client sees."""

    def __init__(self) -> None:
        self._remembered: Any = None
        self._calls = 0

    @expose
    def echo(self, value: Any) -> Any:
        return value

    @expose
    def remember(self, value: Any, *, wait: float = 0.0) -> None:
        time.sleep(wait)
        self._remembered = value.copy() if isinstance(value, np.ndarray) else value

    @expose
    def recall(self) -> Any:
        return self._remembered

    @expose
    def count(self) -> int:
        self._calls += 1
        return self._calls

    @expose
    def sleep(self, seconds: float) -> str:
        time.sleep(seconds)
        return "awake"

    @expose
    def describe(self, array: np.ndarray) -> dict:
        return {"writeable": array.flags.writeable, "owns": array.flags.owndata, "sum": int(array.sum())}

    @expose
    def write_to(self, array: np.ndarray) -> None:
        array[...] = 0

    @expose
    def fail(self, kind: str) -> None:
        kinds = {"ValueError": ValueError, "KeyError": KeyError, "OSError": OSError, "missing": CameraMissing}
        kinds["exit"] = SystemExit
        raise kinds[kind]("front_cam is missing")

    @expose
    def unsendable(self) -> Any:
        return {"answer": [1, {2, 3}]}

    @expose
    def clients(self) -> list:
        return server.clients()

    @expose
    def pid(self) -> int:
        return os.getpid()

    @expose
    def resources(self) -> dict:
        return {"fds": len(os.listdir("/proc/self/fd")), "threads": threading.active_count()}

    def hidden(self) -> str:
        return "not exposed"


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--name", default="")
    parser.add_argument("--ns-port", type=int, default=9091)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--max-message-bytes", type=int, default=1 << 26)
    parser.add_argument("--no-shared-memory", action="store_true")
    args = parser.parse_args()
    with EndWish() as wish:  # a name that is registered is removed again whenever the signal comes
        server = ShmServer(
            Session, port=args.port, max_message_bytes=args.max_message_bytes, shared_memory=not args.no_shared_memory
        )
        if args.name:
            server.register(args.name, ns_port=args.ns_port)
        print(server.uri, flush=True)
        server.serve_forever(wish)
    print("ended", flush=True)
