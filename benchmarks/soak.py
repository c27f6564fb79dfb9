"""Does a service stay as it is over many queries? Memory, file descriptors and shared segments, side by side.

    python benchmarks/soak.py --queries 20000

A tiny policy is served by ``apt.infer.remote_service`` in a process of its own. This process is a client that stays;
others come, ask and leave, and some are killed with -9 while they ask. Every ``--report`` queries a row says what both
processes hold; the verdict is the slope after the first quarter (caches fill), and whether counts are what they were.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from shm_transport import NoNameServer, ShmProxy, get_shm_proxy
from shm_transport.names import NameServer
from shm_transport.segments import DIRECTORY, PREFIX

ROOT = Path(__file__).resolve().parents[1]
URI = "soak"
VISIT_EVERY, VISIT_QUERIES = 100, 5  # a client that comes and leaves
MOST_GROWTH = 0.02  # of the resident memory, from the first quarter's end to the end

MAKE_CHECKPOINT = """
import sys
from pathlib import Path
from benchmarks.soak import write_tiny_checkpoint

write_tiny_checkpoint(Path(sys.argv[1]))
"""
DOOMED = """
import sys
from benchmarks.soak import URI, frame
from shm_transport import get_shm_proxy

robot, time = get_shm_proxy(URI, ns_port=int(sys.argv[1]), timeout=120.0), 0
while True:
    robot.run_inference(frame(time), "to be killed")
    time += 1
"""


@dataclass(frozen=True)
class Holdings:
    """What a process holds."""

    rss_mib: float
    descriptors: int
    threads: int
    mapped: int  # shared segments

    @classmethod
    def of(cls, pid: int) -> "Holdings":
        status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        maps = Path(f"/proc/{pid}/maps").read_text().splitlines()
        return cls(
            rss_mib=int(status["VmRSS"].split()[0]) / 1024,
            descriptors=len(os.listdir(f"/proc/{pid}/fd")),
            threads=int(status["Threads"]),
            mapped=sum(PREFIX in line for line in maps),
        )


def frame(time: int) -> dict:
    """What ``PickPlaceCan`` robots send: two cameras, one arm, the clock in control steps."""
    image = np.full((240, 320, 3), time % 256, np.uint8)
    camera = {
        "camera": {"width": 320, "height": 240, "K": np.array([[300.0, 0, 160], [0, 300, 120], [0, 0, 1]])},
        "data": {"color": image, "wcT": np.eye(4)},
    }
    return {"e2h_cam": camera, "eih_cam": camera, "ee_pose": np.eye(4), "gripper": 1.0, "timestamp": float(time)}


def write_tiny_checkpoint(folder: Path) -> None:
    """A policy with random weights, as a run would leave it; in a process of its own, as this one needs no torch."""
    from apt.checkpoint import write_config
    from apt.model.vla import VLA
    from apt.presets import CONFIGS
    from train_utils.saving import save_checkpoint

    config = dataclasses.replace(CONFIGS["debug"], image_size=64)
    save_checkpoint({"weights": VLA(config.vla_config()).released_weights()}, folder / "ckpt_latest.pt")
    write_config(folder, json.loads(json.dumps(config.to_dict())))


@contextlib.contextmanager
def process(*arguments: str, quiet: bool = False) -> Iterator[subprocess.Popen]:
    """A Python process of the repository, ended with the block."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    output = subprocess.DEVNULL if quiet else subprocess.PIPE
    started = subprocess.Popen([sys.executable, *arguments], cwd=ROOT, env=environment, stdout=output, text=True)
    try:
        yield started
    finally:
        started.terminate()
        started.wait(30)


@contextlib.contextmanager
def service(checkpoint: Path, steps: int) -> Iterator[tuple[int, int]]:
    """A name server and the service; gives the name server's port and the service's process id."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    flags = [
        "--ckpt",
        str(checkpoint),
        "--uri",
        URI,
        "--ns_port",
        str(port),
        "--steps",
        str(steps),
        "--status_every",
        "0",
    ]
    with process("-m", "Pyro4.naming", "-n", "localhost", "-p", str(port), quiet=True):
        deadline = time.monotonic() + 30
        while True:
            try:
                NameServer("localhost", port).names()
                break
            except NoNameServer:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.1)
        with process("-m", "apt.infer.remote_service", *flags) as served:
            for line in served.stdout:
                if line.startswith("ready"):
                    break
            else:
                raise SystemExit("the service did not start")
            yield port, served.pid


def visit(port: int) -> None:
    """A client that comes, asks and leaves."""
    with get_shm_proxy(URI, ns_port=port, timeout=120.0) as robot:
        for moment in range(VISIT_QUERIES):
            robot.run_inference(frame(moment), "passing by")


def soak(
    robot: ShmProxy, port: int, server_pid: int, queries: int, report: int
) -> list[tuple[int, Holdings, Holdings]]:
    """Ask until the service has answered so many queries; what both sides held, every ``report`` of them."""
    rows: list[tuple[int, Holdings, Holdings]] = []
    began, asked, answered, killed = time.monotonic(), 0, 0, 0
    doomed = None
    print("queries  seconds  server MiB  fds  threads  mapped  client MiB  fds  threads  mapped  segment names")
    while answered < queries:
        robot.run_inference(frame(asked), "stay")
        asked += 1
        if asked % VISIT_EVERY == 0:
            visit(port)
        if asked % 10 == 0:
            answered = robot.status()["queries"]["answered"]
        if answered < report * (len(rows) + 1):
            continue
        if doomed is not None:
            doomed.kill()
            doomed.wait()
            killed += 1
            doomed = None
            time.sleep(3.0)  # the server notices within that
        names = sum(name.startswith(PREFIX) for name in os.listdir(DIRECTORY))
        rows.append((answered, Holdings.of(server_pid), Holdings.of(os.getpid())))
        held = "  ".join(
            f"{side.rss_mib:10.1f}  {side.descriptors:3}  {side.threads:7}  {side.mapped:6}" for side in rows[-1][1:]
        )
        print(f"{answered:7}  {time.monotonic() - began:7.0f}  {held}  {names:13}", flush=True)
        if len(rows) % 2:  # between every other pair of rows, a client that is killed in the end
            doomed = subprocess.Popen([sys.executable, "-c", DOOMED, str(port)], cwd=ROOT, stderr=subprocess.DEVNULL)
    if doomed is not None:
        doomed.kill()
        doomed.wait()
    status = robot.status()
    total, rate = status["queries"]["latency_s"]["total"], answered / (time.monotonic() - began)
    print(
        f"{answered} queries, {status['queries']['failed']} failed, {rate:.0f} per second, "
        f"p50 {1e3 * total['p50']:.1f} ms, p99 {1e3 * total['p99']:.1f} ms; "
        f"{asked // VISIT_EVERY} clients came and left, {killed} were killed"
    )
    return rows


def verdict(rows: list[tuple[int, Holdings, Holdings]]) -> bool:
    """Print slopes after the first quarter; whether everything stayed as it was."""
    settled = [row for row in rows if row[0] >= rows[-1][0] / 4]
    flat = True
    for side, which in (("server", 1), ("client", 2)):
        thousands = np.array([row[0] for row in settled]) / 1000
        rss = np.array([row[which].rss_mib for row in settled])
        slope = np.polyfit(thousands, rss, 1)[0] if len(settled) > 1 else 0.0
        growth = slope * (thousands[-1] - thousands[0]) / rss[0]
        counts = {
            name: (getattr(settled[0][which], name), getattr(settled[-1][which], name))
            for name in ("descriptors", "threads", "mapped")
        }
        steady = growth <= MOST_GROWTH and all(first >= last for first, last in counts.values())
        told = ", ".join(f"{name} {first} to {last}" for name, (first, last) in counts.items())
        print(
            f"{side}: {1024 * slope:+.1f} KiB per 1,000 queries ({growth:+.2%} in all), {told}: "
            + ("flat" if steady else "GROWS")
        )
        flat = flat and steady
    return flat


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--queries", type=int, default=20000)
    parser.add_argument("--report", type=int, default=1000, help="queries between two rows (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=1, help="denoising steps (default: %(default)s)")
    parser.add_argument("--ckpt", type=Path, help="default: a tiny policy with random weights")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if args.ckpt is None:
            subprocess.run([sys.executable, "-c", MAKE_CHECKPOINT, folder], cwd=ROOT, check=True)
        checkpoint = args.ckpt or Path(folder) / "ckpt_latest.pt"
        with service(checkpoint, args.steps) as (port, server_pid):
            with get_shm_proxy(URI, ns_port=port, timeout=120.0) as robot:
                rows = soak(robot, port, server_pid, args.queries, args.report)
    left = [name for name in os.listdir(DIRECTORY) if name.startswith(PREFIX)]
    print(f"segments left after the end: {len(left)}")
    flat = verdict(rows) and not left
    print(f"verdict: {'flat' if flat else 'NOT FLAT'} over {rows[-1][0]} queries")
    return 0 if flat else 1


if __name__ == "__main__":
    sys.exit(main())
