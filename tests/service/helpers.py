"""A service of a tiny policy in a process of its own, and what robots would send it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

from apt.checkpoint import write_config
from apt.model.vla import VLA
from shm_transport import ShmProxy, get_shm_proxy
from tests.infer.helpers import tiny_policy
from tests.transport.conftest import Process, running
from train_utils.saving import save_checkpoint

PROMPT = "reach for the red square"
STEPS = 2


def write_checkpoint(folder: Path, dataset_class: str = "PickPlaceCan", **changes) -> Path:
    """A tiny policy with averaged weights, as a run on ``dataset_class`` would leave it; ``changes`` of its
    ``VLAConfig``."""
    folder.mkdir(parents=True)
    policy = tiny_policy(**changes)
    config = dataclasses.replace(policy.train_config, dataset_classes=(dataset_class,))
    shadows = [0.9 * p.detach() for p in VLA(config.vla_config()).parameters() if p.requires_grad]
    content = {
        "weights": policy.model.released_weights(),
        **policy.model.origin.entries(),
        "ema": {"decay": 0.9, "num_updates": 1, "shadow_params": shadows},
        "current_iters": 1,
    }
    save_checkpoint(content, folder / "ckpt_latest.pt")
    write_config(folder, json.loads(json.dumps(config.to_dict())))
    return folder / "ckpt_latest.pt"


@contextlib.contextmanager
def running_policy(checkpoint: Path, ns_port: int, *flags: str, uri: str = "apt_control") -> Iterator[Process]:
    """``python -m apt.infer.remote_service``, ready; ``lines`` are what it has printed."""
    arguments = ["--ckpt", str(checkpoint), "--uri", uri, "--ns_port", str(ns_port), "--steps", str(STEPS), *flags]
    with running("-m", "apt.infer.remote_service", *arguments, env={"OMP_NUM_THREADS": "1"}) as process:
        wait_until_ready(process)
        yield process


def wait_until_ready(process: Process) -> None:
    """Until a service has said its contract; ``process.lines`` are what it has printed."""
    process.lines = []
    while not (process.lines and process.lines[-1].startswith("answers")):  # the last line of the contract
        line = process.line()
        assert line or process.popen.poll() is None, "\n".join(process.lines)
        process.lines.append(line)


def connect(ns_port: int, uri: str = "apt_control", timeout: float = 20.0) -> ShmProxy:
    return get_shm_proxy(uri, ns_port=ns_port, timeout=timeout)
