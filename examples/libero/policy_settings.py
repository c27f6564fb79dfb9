"""Which policy is asked for, and what it takes to make one in another process."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


class PolicyError(RuntimeError):
    """A policy that cannot be had, or does not suit LIBERO; the message says what to do."""


@dataclass(frozen=True)
class PolicySettings:
    """What it takes to make a policy in another process."""

    name: str = "model"
    """A key of ``examples.libero.policies.POLICIES``."""
    controller_name: str = "control"
    """Of the policy service, with the name server's address."""
    controller_host: str = "localhost"
    controller_port: int = 9091
    ckpt: Path | None = None
    """A checkpoint to plan with in the simulator's process; None: the service plans."""
    gpu: int = 0
    """That ``ckpt`` runs on, where there is one."""
    ensemble: int = 4
    ema: bool = False
    denoising_steps: int | None = None
    demos: Path | None = None
    """Folder of recorded episodes."""
