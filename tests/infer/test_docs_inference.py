"""docs/inference.md does what it says: every snippet is run, in the document's order, on a tiny policy."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from apt.checkpoint import main as checkpoint_command
from shm_transport.names import NameServer
from tests.hub_stand_in import StandIn
from tests.service.helpers import write_checkpoint
from tests.synthetic import write_episode
from tests.transport.conftest import ROOT, free_port, running_name_server, wait_until

DOCS = ROOT / "docs" / "inference.md"
CAMERAS = ("head_cam", "rh_cam")

#: what runs in the robot program's process, and what needs a service
LOCAL = (
    "A planner in your process",
    "Frames",
    "Chunks",
    "Steps, sampler, ensemble",
    "Real-time chunking",
    "Checkpoints",
)
TUNNEL = "Another machine"

# Programs that are not here, or would fetch something. Each checks what it was asked for.
STAND_INS = {
    "hf": """
        [ "$1 $2" = "auth login" ] && exit
        [ "$1 $2 $3" = "download KechunXu1/apt_models --local-dir" ] || exit 2
        cp -r checkpoints/APT/ft_aloha "$4/apt_vla_ftpp" """,
    "pip": """
        [ "$1" = install ] && shift
        exec python -c 'import importlib.metadata, sys; print(*map(importlib.metadata.version, sys.argv[1:]))' "$@" """,
    "python": 'exec "$PYTHON" "$@"',
}


def snippets() -> list[tuple[str, str, str]]:
    """(section, language, text) of every fenced block."""
    found, section = [], ""
    for heading, language, text in re.findall(
        r"^#+ ([^\n]*)$|^```(\w+)\n(.*?)^```", DOCS.read_text("utf-8"), re.S | re.M
    ):
        section = heading or section
        if language:
            found.append((section, language, text))
    return found


def camera_image(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, (48, 64, 3), dtype=np.uint8)


ROBOT = SimpleNamespace(
    world_from_base=np.eye(4),
    base_from_ee=np.eye(4),
    world_from_head=np.eye(4),
    ee_from_hand=np.eye(4),
    head_K=np.diag([64.0, 64.0, 1.0]),
    hand_K=np.diag([64.0, 64.0, 1.0]),
    head_image=camera_image(0),
    hand_image=camera_image(1),
    gripper_width=0.04,
)


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """What the document's commands find: a checkpoint, episodes, and the files that are copied to a robot."""
    monkeypatch.chdir(tmp_path)
    write_checkpoint(tmp_path / "checkpoints/APT/ft_aloha", "AlohaPickPlace")
    Path("episodes").mkdir()
    for index in range(2):
        write_episode(Path(f"episodes/ep{index:03d}.h5"), index, cameras=CAMERAS, dt=0.1)
    Path("data_loc.yaml").write_text(f"default:\n  AlohaPickPlace: {tmp_path / 'episodes'}\n")
    monkeypatch.setenv("APT_DATA_LOC", str(tmp_path / "data_loc.yaml"))
    shutil.copytree(ROOT / "shm_transport", "shm_transport", ignore=shutil.ignore_patterns("__pycache__"))
    Path("examples").mkdir()
    for name in ("__init__.py", "client_minimal.py", "record_frames.py"):
        shutil.copy(ROOT / "examples" / name, "examples")
    Path("scripts").symlink_to(ROOT / "scripts")
    Path("bin").mkdir()
    for name, body in STAND_INS.items():
        Path("bin", name).write_text("#!/usr/bin/env bash\nset -e\n" + body)
        Path("bin", name).chmod(0o755)
    return tmp_path


def test_the_planners_code_runs_as_it_is_written(folder, capsys):
    code = {section: [text for where, language, text in snippets() if (where, language) == (section, "python")]
            for section in LOCAL}  # fmt: skip
    assert sum(map(len, code.values())) == 6
    assert checkpoint_command(["export", "checkpoints/APT/ft_aloha/ckpt_latest.pt", "ft_aloha_exported"]) == 0
    names = {"robot": ROBOT}
    exec(code.pop("Frames")[0], names)  # the others use it
    for text in (text for texts in code.values() for text in texts):
        exec(text.replace('"cuda:0"', '"cpu"'), names)
    assert names["poses"].shape == (1, 32, 1, 4, 4) and names["plan"].poses.shape == (1, 32, 1, 4, 4)
    assert "denoise=" in capsys.readouterr().out


class Terminals:
    """Runs the document's commands: servers in the background, one of each program at a time, the others to their end.

    ``port`` of the name server and ``service_port`` stand for 9091 and 9092, which may be taken here.
    """

    def __init__(self, folder: Path, port: int, service_port: int) -> None:
        self.folder, self.port, self.service_port = folder, port, service_port
        path = os.pathsep.join([str(folder / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]])
        self.environment = {**os.environ, "PATH": path, "PYTHON": sys.executable, "PYTHONPATH": str(ROOT)}
        self.environment["OMP_NUM_THREADS"] = "1"
        self.servers: dict[str, subprocess.Popen] = {}
        self.said = ""

    def adapt(self, line: str) -> str:
        """A command as it runs here: ports, the machine's name, no GPU, few steps."""
        line = line.replace("9091", str(self.port)).replace("9092", str(self.service_port))
        line = line.replace("gpu-machine", "localhost").replace("--compile graphs", "--compile none")
        for program, flag in (
            ("apt.infer.remote_service", "--ns_port"),
            ("client_minimal.py", "--ns_port"),
            ("shm_transport.check", "--ns-port"),
        ):
            if line.startswith("python ") and program in line and flag not in line:
                line += f" {flag} {self.port}"
        if "apt.infer.remote_service" in line and "--steps" not in line and "--status" not in line:
            line += " --steps 2"
        return line

    def run(self, text: str) -> None:
        for line in text.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if not words:
                continue
            if words[0] == "export":
                self.environment |= dict(word.split("=", 1) for word in words[1:])
            elif words[0] == "pyro4-ns":
                self._start("pyro4-ns", self.adapt(line), "URI = ")
            elif "apt.infer.remote_service" in words and "--status" not in words:
                self._start("apt.infer.remote_service", self.adapt(line), "answers with")
            else:
                self._finish(self.adapt(line))

    def _start(self, program: str, line: str, ready: str) -> None:
        self.stop(program)
        server = subprocess.Popen(
            ["bash", "-c", f"exec {line}"], cwd=self.folder, env=self.environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        self.servers[program] = server
        said = ""
        while ready not in said:
            heard = server.stdout.readline()
            assert heard, f"{line}\n{said}"
            said += heard

    def _finish(self, line: str) -> None:
        done = subprocess.run(
            ["bash", "-c", line], cwd=self.folder, env=self.environment, text=True, capture_output=True, timeout=300
        )
        assert done.returncode == 0, f"{line}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
        self.said += done.stdout

    def stop(self, program: str) -> None:
        if server := self.servers.pop(program, None):
            server.terminate()
            server.communicate(timeout=60)

    def close(self) -> None:
        for program in list(self.servers)[::-1]:
            self.stop(program)


@pytest.mark.slow
def test_every_command_and_the_clients_code_run_as_they_are_written(folder, capsys):
    """In the document's order; the tunnel has a test of its own."""
    names = {"robot": ROBOT}
    terminals, hub = Terminals(folder, free_port(), free_port()), StandIn()
    terminals.environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(folder / "hf"), "HF_TOKEN": "hf_of_nobody"}
    with contextlib.closing(terminals), contextlib.closing(hub):
        terminals.environment["HF_HUB_OFFLINE"] = "0"
        for section, language, text in snippets():
            if language == "bash" and "ssh -f" not in text:
                terminals.run(text)
            elif language == "python" and (section not in LOCAL or section == "Frames"):
                exec(text.replace("9091", str(terminals.port)), names)
    said = capsys.readouterr().out
    assert names["poses"].shape == (1, 32, 1, 4, 4) and "'transport'" in said
    assert "['head_cam', 'rh_cam']" in said and "camera 'head_cam' is missing" in said
    assert terminals.said.count("20 control steps; last position") == 2 and "p99" in terminals.said


FORWARDER = '''
"""ssh -f -N -L PORT:localhost:PORT ...: listens here, in a network of its own; each connection goes to the other side
through a Unix socket named after the port."""
import fcntl, os, socket, struct, sys, threading

lo = socket.socket()
fcntl.ioctl(lo, 0x8914, struct.pack("16sh22x", b"lo", 0x49))  # SIOCSIFFLAGS: up, loopback, running


def copy(source, target):
    while data := source.recv(1 << 16):
        target.sendall(data)
    target.shutdown(socket.SHUT_WR)


def serve(listener, path):
    while True:
        near = listener.accept()[0]
        far = socket.socket(socket.AF_UNIX)
        far.connect(path)
        for pair in ((near, far), (far, near)):
            threading.Thread(target=copy, args=pair, daemon=True).start()


assert sys.argv[1:3] == ["-f", "-N"] and sys.argv[-1].startswith("user@"), sys.argv
listeners = []
for flag, forward in zip(sys.argv[3:-1:2], sys.argv[4:-1:2]):
    here, host, there = forward.split(":")
    assert (flag, host) == ("-L", "localhost")
    listeners.append((socket.create_server(("127.0.0.1", int(here))), there + ".sock"))
if os.fork():
    os._exit(0)  # -f
threads = [threading.Thread(target=serve, args=each) for each in listeners]
for thread in threads:
    thread.start()
'''


def relay(port: int) -> socket.socket:
    """The far end of the tunnel: connections to ``PORT.sock`` go on to localhost:PORT."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(f"{port}.sock")
    listener.listen()

    def copy(source, target):
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)

    def serve():
        with contextlib.suppress(OSError):  # closed at the end
            while True:
                near = listener.accept()[0]
                far = socket.create_connection(("localhost", port))
                for pair in ((near, far), (far, near)):
                    threading.Thread(target=copy, args=pair, daemon=True).start()

    threading.Thread(target=serve, daemon=True).start()
    return listener


@pytest.mark.slow
def test_a_robot_behind_a_tunnel_uses_the_service_over_the_socket(folder):
    """The robot's side runs in a network and a shared memory of its own, as on another machine; a program in ssh's
    place carries the bytes across."""
    isolated = ["unshare", "--user", "--map-root-user", "--net", "--mount"]
    if not shutil.which("unshare") or subprocess.run([*isolated, "true"], capture_output=True).returncode != 0:
        pytest.skip("this system lets nobody make a network of his own (unshare --user --net)")
    service, robot = [text for section, _, text in snippets() if section == TUNNEL][:2]
    port, service_port = free_port(), free_port()
    Path("bin/forwarder.py").write_text(FORWARDER)
    Path("bin/ssh").write_text('#!/usr/bin/env bash\nexec python bin/forwarder.py "$@" >/dev/null 2>forwarder.log\n')
    Path("bin/ssh").chmod(0o755)
    with running_name_server(port), contextlib.closing(Terminals(folder, port, service_port)) as terminals:
        terminals.run("python -m examples.record_frames episodes/ep000.h5 frames.npz --dataset-class AlohaPickPlace")
        terminals.run(service)
        wait_until(lambda: NameServer("localhost", port).find("apt_control"))
        with contextlib.closing(relay(port)), contextlib.closing(relay(service_port)):
            lines = [terminals.adapt(line) for line in robot.splitlines()]
            script = "\n".join(["set -e", "mount -t tmpfs none /dev/shm", *lines])
            terminals._finish(f"{shlex.join(isolated)} bash -c {shlex.quote(script)}")
    assert "20 control steps; last position" in terminals.said
    assert re.search(r"note .*socket", terminals.said), terminals.said
