"""What every service of a policy is told about it, checked before anything is loaded, and the policy loaded."""

from __future__ import annotations

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from apt.hub import located
from data_utils.cli import CommandLineError

if TYPE_CHECKING:
    from apt.infer.planner import TrajPlanner
    from apt.infer.service_session import Checkpoint


@dataclass(frozen=True)
class ServedPolicy:
    """Flags; a service's own come in a subclass."""

    ckpt: Path | None = None
    """A run's ckpt_*.pt, its configuration beside it, an exported folder, a run's name, or org/name[@revision] of the
    Hub."""
    port: int = 0
    """0: any free one."""
    ensemble: int = 4
    """Trajectories that are blended into the returned one; 0: none."""
    ema: bool = False
    """Use the averaged weights."""
    device: str | None = None
    """cpu, cuda or cuda:N; by default the first GPU where there is one."""
    compile: str = "none"
    """none, compile (torch.compile) or graphs (CUDA graphs too): faster queries after minutes of warm-up."""
    steps: int | None = None
    """Denoising steps; by default 20, of flow matching 10 or 4."""
    sampler: str | None = None
    """ddim, or dpm for few steps (8 to 10); of flow matching euler. By default the policy's own."""
    seed: int = 0
    """Of each session's noise."""
    max_batch: int | None = None
    """Clients' queries that share a pass of the policy at most; by default 16, with --compile 1: each size compiles."""
    max_wait_ms: float = 5.0
    """How long a pass waits for others that asked within the last two seconds; a lone client never waits."""

    def named(self):
        """With a run's name, or a repository's, made its checkpoint. Raises ``HubError``."""
        return self if self.ckpt is None else dataclasses.replace(self, ckpt=located(self.ckpt))

    def check(self) -> None:
        """Raises ``CommandLineError``."""
        if self.ckpt is None:
            raise CommandLineError("--ckpt is missing: a run's ckpt_latest.pt or an exported folder")
        if not self.ckpt.exists():
            raise CommandLineError(f"--ckpt: there is no {self.ckpt}; check the path, or train one")
        if self.ckpt.is_dir() and (self.ckpt / "ckpt_latest.pt").is_file():
            raise CommandLineError(f"--ckpt: {self.ckpt} is a run's folder; name {self.ckpt / 'ckpt_latest.pt'}")
        if not 0 <= self.port < 1 << 16:
            raise CommandLineError(f"--port is {self.port}; wanted 0 to 65535")
        if self.ensemble < 0:
            raise CommandLineError(f"--ensemble is {self.ensemble}; wanted 0 (off) or more")
        if (self.max_batch is not None and self.max_batch < 1) or not self.max_wait_ms >= 0:
            raise CommandLineError("--max-batch wants 1 or more, --max-wait-ms 0 or more")

    def check_model(self) -> None:
        """What needs torch to know, and no weights. Raises ``ValueError``: a device or a way of compiling that is not
        there, steps or a sampler that the policy cannot use, a checkpoint without configuration."""
        from apt.checkpoint import read_config
        from apt.configs import train_config_from_dict
        from apt.infer.policy import pick_device
        from apt.infer.stages import check_compile_mode
        from apt.model.objectives.registry import make_objective

        check_compile_mode(self.compile, pick_device(self.device))
        trained, _ = train_config_from_dict(read_config(self.ckpt))
        make_objective(trained.objective).schedule(self.steps, self.sampler)

    def load(self) -> tuple[TrajPlanner, Checkpoint]:
        """Loaded and warmed up: what compiles would hold the first clients up.

        Raises:
            CheckpointError, CheckpointMismatch: a checkpoint that is of no use.
        """
        from apt.checkpoint import checkpoint_sha256
        from apt.infer.planner import TrajPlanner
        from apt.infer.service_session import Checkpoint

        with ThreadPoolExecutor(1) as background:
            digest = background.submit(checkpoint_sha256, self.ckpt)
            print(f"loading {self.ckpt}", flush=True)
            planner = TrajPlanner(
                self.ckpt,
                self.device,
                self.ensemble,
                use_ema=self.ema,
                seed=self.seed,
                steps=self.steps,
                sampler=self.sampler,
                compile=self.compile,
            )
            planner.policy.set_batching(self.max_batch, 1e-3 * self.max_wait_ms)
            planner.warm_up()
            name = f"{self.ckpt.resolve().parent.name}/{self.ckpt.name}"
            return planner, Checkpoint(name, digest.result(), self.ema)
