"""Real processes: a name server and services."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from shm_transport.names import NameServer, NoNameServer

ROOT = Path(__file__).resolve().parents[2]


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def wait_until(condition, seconds: float = 5.0):
    """The condition's first true value; fails if there is none in time."""
    deadline = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < deadline, f"not within {seconds} s: {condition}"
        time.sleep(0.02)


class Process:
    """A Python process of the repository; killed at the end of the test if it still runs."""

    def __init__(self, *arguments: str, env: dict | None = None):
        self.popen = subprocess.Popen(
            [sys.executable, *arguments],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), **(env or {})},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.pid = self.popen.pid

    def line(self) -> str:
        return self.popen.stdout.readline().strip()

    def kill(self) -> None:
        self.popen.kill()
        self.popen.wait(10)

    def terminate(self) -> str:
        """SIGTERM; what it still printed."""
        self.popen.send_signal(signal.SIGTERM)
        return self.popen.communicate(timeout=15)[0]

    def suspend(self) -> None:
        self.popen.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self.popen.pid, os.WSTOPPED)  # all its threads stand still, not just the signal sent

    def resume(self) -> None:
        self.popen.send_signal(signal.SIGCONT)


@contextlib.contextmanager
def running(*arguments: str, env: dict | None = None):
    process = Process(*arguments, env=env)
    try:
        yield process
    finally:
        process.kill()
        process.popen.stdout.close()
        process.popen.stdin.close()


@contextlib.contextmanager
def running_name_server(port: int):
    with running("-m", "Pyro4.naming", "-n", "localhost", "-p", str(port)) as process:

        def answers() -> bool:
            try:
                NameServer("localhost", port, timeout=1.0).names()
                return True
            except NoNameServer:
                return False

        wait_until(answers, 15)
        yield process


@contextlib.contextmanager
def running_service(*arguments: str, env: dict | None = None):
    with running("-m", "tests.transport.service", *arguments, env=env) as process:
        process.uri = process.line()
        assert process.uri.startswith("PYRO:"), process.uri + process.popen.stdout.read()
        yield process


@pytest.fixture(scope="session")
def ns_port():
    """The port of a name server that runs for the whole session."""
    port = free_port()
    with running_name_server(port):
        yield port


@pytest.fixture(scope="module")
def service(ns_port, request):
    """A service that the tests of one file share, known as ``service.name``."""
    name = "of_" + request.module.__name__
    with running_service("--name", name, "--ns-port", str(ns_port)) as process:
        process.name = name
        yield process


@pytest.fixture
def robot(service, ns_port):
    """A client of the shared service."""
    from shm_transport import get_shm_proxy

    with get_shm_proxy(service.name, ns_port=ns_port, timeout=10.0) as proxy:
        yield proxy
