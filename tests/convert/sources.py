"""A source of made-up episodes for tests of the runner: some are fine, some are not, some end the process."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_utils.convert.runner import Job, Skipped
from data_utils.errors import DataError
from data_utils.h5io import CameraData, EpisodeData

K = np.array([[30.0, 0, 16], [0, 30, 12], [0, 0, 1]])


def episode(frames: int = 3) -> EpisodeData:
    images = [np.full((24, 32, 3), 20 * t, np.uint8) for t in range(frames)]
    return EpisodeData(
        timestamp=np.arange(frames) * 0.1,
        world_from_ee=np.tile(np.eye(4), (frames, 1, 1, 1)),
        gripper=np.zeros((frames, 1)),
        prompts=["wave"],
        cameras={"front": CameraData(np.eye(4), K, images)},
    )


@dataclass
class Source:
    """One episode per kind: "good", "skip", "wrong", "surprise", "killed", "slow"."""

    kinds: tuple[str, ...]
    log: Path | None = None  # a file per episode that was tried

    def jobs(self) -> list[Job]:
        return [Job(f"part/{index:02d}_{kind}", (index, kind)) for index, kind in enumerate(self.kinds)]

    def made_from(self, job: Job) -> None:
        return None

    def convert(self, job: Job) -> EpisodeData:
        index, kind = job.key
        if self.log is not None:
            (self.log / f"{index:02d}_{kind}").touch()
        if kind == "skip":
            raise Skipped("not successful")
        if kind == "wrong":
            raise DataError(f"{job.name}: has no pose", "pose")
        if kind == "surprise":
            raise KeyError("velocity")
        if kind == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if kind == "slow":
            time.sleep(30)
        return episode()
