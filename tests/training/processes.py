"""Training commands as real processes: started, watched, stopped, and continued by the line that they print."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

from tests.training.helpers import REPOSITORY

SHORT = "--bs 2 --sample_multiplex 50 --image_size 64 --vis_interval 0 --save_latest_interval 5".split()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start_script(
    folder: Path,
    data_loc: Path,
    *arguments: object,
    gpus: str = "cpu,cpu",
    port: int | None = None,
    ckpt_dir: Path | None = None,
) -> subprocess.Popen:
    """``scripts/train.sh``; files go to a folder with a space in its name."""
    command = ["bash", "scripts/train.sh", "--config", "debug", "--gpus", gpus, *SHORT]
    command += [] if port is None else ["--port", port]
    command += ["--ckpt_dir", ckpt_dir or folder / "a b/ckpt", "--log_dir", folder / "a b/log", *arguments]
    environment = {**os.environ, "PYTHON": sys.executable, "APT_DATA_LOC": str(data_loc), "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([*map(str, command)], cwd=REPOSITORY, env=environment, text=True, **pipes)


def wait_for(process: subprocess.Popen, text: str) -> str:
    seen = ""
    for line in process.stdout:
        seen += line
        if text in line:
            return seen
    raise AssertionError(f"{text!r} never came: {seen}\n{process.stderr.read()}")


def ranks_of(process: subprocess.Popen) -> dict[int, int]:
    """Process id by rank, of the training processes below ``process``."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            is_trainer = b"apt.train" in (folder / "cmdline").read_bytes().split(b"\0")
            environment = dict(item.partition(b"=")[::2] for item in (folder / "environ").read_bytes().split(b"\0"))
            if is_trainer and b"RANK" in environment and descends(int(folder.name), process.pid):
                found[int(environment[b"RANK"])] = int(folder.name)
        except OSError:  # gone meanwhile
            continue
    return found


def launched(process: subprocess.Popen) -> bool:
    """Whether ``process`` has started the one that starts the ranks."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return any(b"train_utils.ranks" in Path(f"/proc/{child}/cmdline").read_bytes() for child in children)


def descends(pid: int, ancestor: int) -> bool:
    while pid not in (0, ancestor):
        pid = int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
    return pid == ancestor


def printed_command(text: str) -> str:
    (command,) = re.findall(r"(?:resume|start again) with: (.*)", text)
    return command


def run_printed(command: str, *more: str) -> subprocess.CompletedProcess:
    """What a person does: paste the line into a shell, here with an end in sight."""
    line = " ".join([command, *more])
    environment = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    options = {"capture_output": True, "text": True, "timeout": 120}
    return subprocess.run(["bash", "-c", line], cwd=REPOSITORY, env=environment, **options)
