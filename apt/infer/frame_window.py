"""The frames of a robot as far back as a query looks, and the sample that they make."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np

from apt.infer.frames import RobotFrame, check_follows, parse_frame
from data_utils.config import DataConfig
from data_utils.geometry.camera import CameraFrame
from data_utils.geometry.motion import FAR
from data_utils.geometry.pinhole import off_centre
from data_utils.geometry.resample import nearest_index
from data_utils.samples.observation import StateTrack, history_times, make_sample, observed_times
from data_utils.types import Sample

logger = logging.getLogger(__name__)

_MOST_FRAMES = 512


class FrameWindow:
    """The newest frames, oldest first; older ones than a sample needs are dropped. For one thread at a time."""

    def __init__(self, config: DataConfig) -> None:
        self.config = config
        self._frames: deque[RobotFrame] = deque(maxlen=_MOST_FRAMES)
        self._looked_at: set[str] = set()  # cameras, and ee_pose where it was remarked on

    def __len__(self) -> int:
        return len(self._frames)

    @property
    def newest(self) -> RobotFrame:
        return self._frames[-1]

    def copy(self) -> "FrameWindow":
        """The frames of now, to look at while others are added."""
        window = FrameWindow(self.config)
        window._frames.extend(self._frames)
        return window

    def add(self, obs_frames: Sequence[dict[str, Any]]) -> None:
        """Take in frames, oldest first: all of them, or none where one raises ``ValueError``."""
        taken: list[RobotFrame] = []
        for obs_frame in obs_frames:
            taken.append(parse_frame(obs_frame, self.config))
            if len(taken) > 1 or self._frames:
                check_follows(taken[-1], taken[-2] if len(taken) > 1 else self._frames[-1])
        self._frames.extend(taken)
        self._drop_old()
        self._remark(taken)

    def _remark(self, frames: Sequence[RobotFrame]) -> None:
        """Log, once for each camera and for the hands, what is unusual about them."""
        for frame in frames:
            reach = float(np.abs(frame.world_from_ee[:, :3, 3]).max())
            if reach > FAR and "ee_pose" not in self._looked_at:
                self._looked_at.add("ee_pose")
                logger.warning("ee_pose reaches %.0f m from the world's origin; is it in millimetres?", reach)
            for name, camera in frame.cameras.items():
                if name in self._looked_at:
                    continue
                self._looked_at.add(name)
                remark = off_centre(camera.K, camera.rgb.shape[:2])
                if remark is not None:
                    logger.warning("camera %s: %s; does K belong to images of this size?", name, remark)

    def _drop_old(self) -> None:
        step = self.time_step
        if step is None or not self._frames:
            return
        now = self.newest.timestamp
        needed = min(observed_times(self.config, now, step)[0], history_times(self.config, now, step)[0])
        # One frame before the window stays, to interpolate from; two stay where the time step is measured.
        fewest = 1 if self.config.sample_dt or self.config.record_dt else 2
        while len(self._frames) > fewest and self._frames[1].timestamp <= needed:
            self._frames.popleft()

    @property
    def time_step(self) -> float | None:
        """One sampling gap in the frames' clock; None while a single frame cannot tell."""
        config = self.config
        if config.sample_dt is not None or config.record_dt is not None:
            return config.sample_dt if config.sample_dt is not None else config.record_dt
        if len(self._frames) < 2:
            return None
        return (self.newest.timestamp - self._frames[0].timestamp) / (len(self._frames) - 1)

    def sample(self, prompt: str, step: float) -> Sample:
        """What the policy sees at the newest frame, as in training; ``step``: the sampling gap."""
        frames = list(self._frames)
        times = np.array([frame.timestamp for frame in frames])
        now = times[-1]
        shown = nearest_index(times, observed_times(self.config, now, step))
        track = StateTrack(
            times,
            np.stack([frame.world_from_ee for frame in frames]),
            np.stack([frame.gripper for frame in frames]),
        )
        return make_sample(self.config, [frames[i].cameras for i in shown], track, now, prompt, step=step)


def blank_sample(config: DataConfig) -> Sample:
    """Black images and arms at the origin."""
    height, width = config.image_hw
    K = np.array([[width, 0, width / 2], [0, width, height / 2], [0, 0, 1]], np.float32)
    camera = CameraFrame(np.zeros((height, width, 3), np.uint8), K, np.eye(4, dtype=np.float32))
    track = StateTrack(np.zeros(1), np.tile(np.eye(4), (1, config.num_arms, 1, 1)), np.zeros((1, config.num_arms)))
    frames = [dict.fromkeys(config.cameras, camera)] * config.num_obs
    return make_sample(config, frames, track, 0.0, "", step=1.0)
