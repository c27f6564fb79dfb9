"""Find out what is wrong with a set-up, line by line.

    python -m shm_transport.check [--ns-host localhost] [--ns-port 9091] [--name apt_control]

Run where the client runs. Each line is ``ok``, ``note`` (works, if not as fast as it could) or ``FAIL`` and what to do.
Exit code 0 if nothing failed, else 2.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

import numpy as np

from . import wire
from .client import ShmProxy, connection_info, get_shm_proxy, ping
from .errors import TransportError
from .names import DEFAULT_PORT, NameServer
from .segments import DIRECTORY, Segment, available, stale_segments

#: an observation of two 256 x 256 cameras needs 0.4 MB each way; below this, Docker's default, larger ones may not fit
WANTED_SHARED_BYTES = 64 << 20
_ROUNDS = 50


class Report:
    """Prints findings and remembers whether one failed."""

    def __init__(self) -> None:
        self.failed = False

    def ok(self, text: str) -> None:
        print(f"ok    {text}")

    def note(self, text: str) -> None:
        print(f"note  {text}")

    def fail(self, text: str) -> None:
        self.failed = True
        print(f"FAIL  {text}")


def check_shared_memory(report: Report) -> None:
    """Is there shared memory, with room in it, and is any of it left over?"""
    if not available():
        report.note(f"no {DIRECTORY} on this system: arrays go through the socket")
        return
    space = os.statvfs(DIRECTORY)
    size, free = (blocks * space.f_frsize / 1e6 for blocks in (space.f_blocks, space.f_bavail))
    try:
        Segment(1 << 20).close()
    except OSError as error:
        report.note(
            f"no segment can be made in {DIRECTORY} ({error}; {free:.0f} of {size:.0f} MB free): arrays go through the "
            "socket; free some, or give a container more: docker run --shm-size 1g"
        )
    else:
        if free * 1e6 < WANTED_SHARED_BYTES:
            report.note(f"only {free:.0f} of {size:.0f} MB free in {DIRECTORY}; docker run takes --shm-size 1g")
        else:
            report.ok(f"shared memory: {free:.0f} of {size:.0f} MB free in {DIRECTORY}")
    stale = stale_segments()
    if stale:
        total = sum(size for _, size in stale) / 1e6
        report.note(f"{len(stale)} segments of dead processes ({total:.1f} MB); the next service to start removes them")
    else:
        report.ok("no segments of dead processes")


def check_name_server(report: Report, name_server: NameServer, name: str | None) -> bool:
    """Does it answer, and does it know the service? Whether to go on with the service."""
    try:
        names = name_server.names()
        report.ok(f"name server at {name_server}: {len(names)} names{': ' if names else ''}{', '.join(sorted(names))}")
        if name is None:
            report.note("no service was checked; give its name: --name apt_control")
            return False
        report.ok(f"{name} is registered at {name_server.lookup(name)}")
        return True
    except TransportError as error:
        report.fail(str(error))
        return False


def check_service(report: Report, name: str, ns_host: str, ns_port: int) -> None:
    """Does it answer, over which path, and how fast?"""
    try:
        with get_shm_proxy(name, ns_host, ns_port, timeout=10.0) as proxy:
            info = connection_info(proxy)
            report.ok(
                f"{name} answers in version {wire.PROTOCOL_VERSION} of the protocol: {', '.join(info['methods'])}"
            )
            shared = info["shared_memory"]
            if shared:
                report.ok("the service sees this process's shared memory")
            else:
                report.note(
                    "the service does not see this process's shared memory, so arrays go through the socket: it is on "
                    "another host, in a container (docker run --ipc=host on both), of another user, or told not to"
                )
            report_round_trips(report, proxy, "shared memory" if shared else "the socket")
    except TransportError as error:
        report.fail(str(error))


def report_round_trips(report: Report, proxy: ShmProxy, path: str) -> None:
    """Median times there and back, small and with images."""
    for what, payload in (
        ("a small call", None),
        ("2 images of 256 x 256", np.zeros((2, 256, 256, 3), np.uint8)),
        ("3 images of 480 x 640", np.zeros((3, 480, 640, 3), np.uint8)),
    ):
        milliseconds = 1e3 * np.median([ping(proxy, payload) for _ in range(_ROUNDS)])
        way = "the socket" if payload is None else path
        report.ok(f"round trip of {what} through {way}: {milliseconds:.2f} ms")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; its exit code."""
    parser = argparse.ArgumentParser(prog="python -m shm_transport.check", description=__doc__.splitlines()[0])
    parser.add_argument("--ns-host", "--ns_host", default="localhost", help="host of the name server")
    parser.add_argument("--ns-port", "--ns_port", type=int, default=DEFAULT_PORT, help="its port")
    parser.add_argument("--name", "--uri", help="the service's name, apt_control for instance")
    args = parser.parse_args(arguments)
    report = Report()
    check_shared_memory(report)
    if check_name_server(report, NameServer(args.ns_host, args.ns_port), args.name):
        check_service(report, args.name, args.ns_host, args.ns_port)
    return 2 if report.failed else 0


if __name__ == "__main__":
    sys.exit(main())
