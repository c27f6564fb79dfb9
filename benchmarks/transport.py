"""Round trips between two processes of one host: ``shm_transport`` against a WebSocket and Pyro4's socket.

    python benchmarks/transport.py [--seconds 2] [--rounds 5]

The client sends an observation, the service takes it apart into numpy arrays and returns a chunk of 32 poses. Each
service runs in its own process. In every round each transport has its turn on each payload, so that a busy machine
slows them all alike; the percentiles are over all rounds.

- *shm_transport*: as robots use it, over shared memory, and with everything through its socket (as from another host).
- *Pyro4 + msgpack*: Pyro4's proxy and daemon; arrays as dicts of bytes, dtype and shape.
- *WebSocket + msgpack*: the ``websockets`` library without compression, an asyncio server and a blocking client, arrays
  as dicts of bytes, dtype and shape, which is how policy servers are commonly built.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import Pyro4
from websockets.asyncio.server import serve
from websockets.sync.client import connect

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from shm_transport import connection_info, expose, get_shm_proxy
from shm_transport.server import ShmServer

BASELINE = "WebSocket + msgpack"
WARM_UP = 20


def observation(cameras: int, height: int, width: int) -> dict:
    """A frame as a robot sends it: images (H, W, 3) uint8 with their cameras, poses and time."""
    rng = np.random.default_rng(0)
    frame: dict[str, Any] = {
        f"cam{index}": {
            "model": "pinhole",
            "camera": {"width": width, "height": height, "K": np.eye(3)},
            "data": {
                "color": rng.integers(0, 255, (height, width, 3), dtype=np.uint8),
                "wcT": np.eye(4),
                "seg": None,
            },
        }
        for index in range(cameras)
    }
    return {**frame, "ee_pose": np.eye(4)[None], "gripper": np.ones(1), "timestamp": 0.125}


PAYLOADS = {
    "1 KB": np.zeros(1 << 10, np.uint8),
    "8 KB": np.zeros(1 << 13, np.uint8),
    "64 KB": np.zeros(1 << 16, np.uint8),
    "2 x 256 x 256": observation(2, 256, 256),
    "3 x 480 x 640": observation(3, 480, 640),
}


def chunk() -> list:
    """A reply as ``get_action`` gives it: poses (1, 32, 1, 4, 4), grippers (1, 32, 1), times (32,), no image."""
    return [np.tile(np.eye(4), (1, 32, 1, 1, 1)), np.ones((1, 32, 1)), np.arange(32.0), None]


CHUNK = chunk()


def pack(value: Any) -> Any:
    """Arrays as msgpack can carry them."""
    if isinstance(value, np.ndarray):
        return {"nd": value.tobytes(), "dtype": value.dtype.str, "shape": value.shape}
    if isinstance(value, dict):
        return {key: pack(item) for key, item in value.items()}
    if isinstance(value, list):
        return [pack(item) for item in value]
    return value


def unpack(value: Any) -> Any:
    """The arrays of ``pack``, without a copy."""
    if isinstance(value, dict):
        if "nd" in value:
            return np.frombuffer(value["nd"], value["dtype"]).reshape(value["shape"])
        return {key: unpack(item) for key, item in value.items()}
    if isinstance(value, list):
        return [unpack(item) for item in value]
    return value


def image_bytes(payload: Any) -> int:
    """What a policy would look at first; shows that the arrays are usable."""
    if isinstance(payload, np.ndarray):
        return payload.nbytes
    return sum(camera["data"]["color"].nbytes for key, camera in payload.items() if key.startswith("cam"))


class ShmSession:
    """Served by shm_transport."""

    @expose
    def act(self, payload: Any) -> tuple:
        image_bytes(payload)
        return tuple(CHUNK)


class PyroService:
    """Served by Pyro4 over its socket."""

    @Pyro4.expose
    def act(self, payload: Any) -> Any:
        image_bytes(unpack(payload))
        return pack(CHUNK)


def serve_shm() -> None:
    server = ShmServer(ShmSession)
    print(server.uri, flush=True)
    server.serve_forever()


def serve_pyro() -> None:
    Pyro4.config.SERIALIZERS_ACCEPTED = {"msgpack"}
    Pyro4.config.SOCK_NODELAY = True
    daemon = Pyro4.Daemon(host="localhost")
    print(daemon.register(PyroService()), flush=True)
    daemon.requestLoop()


async def serve_websocket() -> None:
    async def answer(socket: Any) -> None:
        async for message in socket:
            image_bytes(unpack(msgpack.unpackb(message)))
            await socket.send(msgpack.packb(pack(CHUNK)))

    async with serve(answer, "localhost", 0, compression=None, max_size=None) as server:
        host, port = next(iter(server.sockets)).getsockname()[:2]
        print(f"ws://{host}:{port}", flush=True)
        await server.serve_forever()


def websocket_client(address: str, stack: contextlib.ExitStack) -> Callable[[Any], Any]:
    socket = stack.enter_context(connect(address, compression=None, max_size=None))

    def act(payload: Any) -> Any:
        socket.send(msgpack.packb(pack(payload)))
        return unpack(msgpack.unpackb(socket.recv()))

    return act


def pyro_client(address: str, stack: contextlib.ExitStack) -> Callable[[Any], Any]:
    Pyro4.config.SERIALIZER = "msgpack"
    Pyro4.config.SOCK_NODELAY = True
    proxy = stack.enter_context(Pyro4.Proxy(address))
    return lambda payload: unpack(proxy.act(pack(payload)))


def shm_client(address: str, stack: contextlib.ExitStack, shared_memory: bool) -> Callable[[Any], Any]:
    proxy = stack.enter_context(get_shm_proxy(address, shared_memory=shared_memory))
    assert connection_info(proxy)["shared_memory"] == shared_memory
    return proxy.act


def measure(act: Callable[[Any], Any], payload: Any, seconds: float) -> list[float]:
    """Round-trip times in microseconds."""
    for _ in range(WARM_UP):
        reply = act(payload)
    assert np.array_equal(reply[0], CHUNK[0]) and reply[2].shape == (32,)
    times = []
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        started = time.perf_counter()
        act(payload)
        times.append(1e6 * (time.perf_counter() - started))
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=2.0, help="for each transport and payload")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--serve", choices=("shm", "pyro", "websocket"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not args.seconds > 0 or args.rounds < 1:
        parser.error("--seconds wants a number above 0, --rounds 1 or more")
    if args.serve == "shm":
        serve_shm()
    elif args.serve == "pyro":
        serve_pyro()
    elif args.serve == "websocket":
        asyncio.run(serve_websocket())
    else:
        compare(args.seconds, args.rounds)


def compare(seconds: float, rounds: int) -> None:
    processes = {}
    for kind in ("shm", "pyro", "websocket"):
        command = [sys.executable, __file__, "--serve", kind]
        processes[kind] = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    times: dict[tuple[str, str], list[float]] = {}
    with contextlib.ExitStack() as stack:
        for process in processes.values():
            stack.callback(process.wait, 10)
            stack.callback(process.terminate)
        at = {kind: process.stdout.readline().strip() for kind, process in processes.items()}
        clients = {
            "shm_transport": shm_client(at["shm"], stack, shared_memory=True),
            "shm_transport, socket only": shm_client(at["shm"], stack, shared_memory=False),
            "Pyro4 + msgpack": pyro_client(at["pyro"], stack),
            BASELINE: websocket_client(at["websocket"], stack),
        }
        for _ in range(rounds):
            for size, payload in PAYLOADS.items():
                for name, act in clients.items():
                    times.setdefault((size, name), []).extend(measure(act, payload, seconds / rounds))
    print(f"{'payload':14} {'transport':28} {'p50 us':>9} {'p99 us':>9} {'faster than WebSocket':>22}")
    for (size, name), found in times.items():
        p50, p99 = np.percentile(found, (50, 99))
        ratio = np.median(times[size, BASELINE]) / p50
        print(f"{size:14} {name:28} {p50:9.0f} {p99:9.0f} {ratio:21.1f}x")


if __name__ == "__main__":
    main()
