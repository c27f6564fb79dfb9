"""From camera frames to a trajectory: ``TrajPlanner``, the policy as a robot program uses it."""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch

from apt.configs import ConfigError
from apt.infer.frames import RobotFrame, parse_frame
from apt.infer.loading import load_policy
from data_utils.collate import Collator
from data_utils.config import DataConfig
from data_utils.datasets import get_dataset_class
from data_utils.observation import (
    StateTrack,
    future_times,
    history_times,
    make_sample,
    observed_times,
    robot_from_policy_ee,
)
from data_utils.resample import nearest_index
from infer_utils.draw_traj import draw_trajectory
from infer_utils.trajectory_ensembler import TrajectoryEnsembler

_MOST_FRAMES = 512


class TrajPlanner:
    """Plans end-effector trajectories from the newest frames.

    Thread-safe: one thread may add frames while another asks for actions. Frames go through the same code as training
    samples (:func:`data_utils.observation.make_sample`).

    Args:
        ckpt_path: a run's ``ckpt_*.pt``, its configuration beside it, or an exported folder.
        device: where the policy runs.
        ensemble: trajectories that are blended into the returned one; 0: none.
        use_ema: use the averaged weights.
        seed: of the diffusion noise.
        steps: denoising steps; None: 20.
    Raises:
        CheckpointError, CheckpointMismatch: see :func:`apt.infer.loading.load_policy`.
    """

    def __init__(
        self,
        ckpt_path: str | Path,
        device: str | torch.device = "cpu",
        ensemble: int = 4,
        use_ema: bool = False,
        seed: int = 0,
        steps: int | None = None,
    ) -> None:
        self.device = torch.device(device)
        self._model, self.train_config = load_policy(ckpt_path, self.device, use_ema)
        self._steps = steps
        self._generator = torch.Generator(self.device).manual_seed(seed)
        self._lock = threading.RLock()  # guards everything below
        self._query = threading.Lock()  # one inference at a time
        self._prompt: str | None = None
        self._frames: deque[RobotFrame] = deque(maxlen=_MOST_FRAMES)
        self._ensemblers: list[TrajectoryEnsembler] = []
        self._num_ensemble = ensemble
        self.set_config(self.train_config.data_configs()[0])

    # -- settings --------------------------------------------------------------------------------------------------

    def set_prompt(self, prompt: str) -> None:
        """The instruction from now on."""
        if not isinstance(prompt, str):
            raise ValueError(f"the prompt is a {type(prompt).__name__}; wanted a text")
        with self._lock:
            self._prompt = prompt

    def set_config(self, config: str | dict | DataConfig) -> None:
        """Cameras, arms and times: a dataset's name, a ``DataConfig`` or its dictionary. Forgets frames.

        Raises:
            ValueError: an unknown name or field, or history and future lengths that the policy was not trained with.
        """
        if isinstance(config, str):
            config = get_dataset_class(config).config
        elif isinstance(config, dict):
            config = DataConfig.from_dict(config)
        trained = self._model.config
        if (config.num_history, config.num_future) != (trained.num_history, trained.num_future):
            raise ConfigError(
                f"the config has {config.num_history} history and {config.num_future} future states, the policy was "
                f"trained with {trained.num_history} and {trained.num_future}"
            )
        tokenize = self._model.vlm.prompt_tokenizer(config.image_hw)
        with self._lock:
            self._config = config
            self._collate = Collator(tokenize, tokenize.pad_id, config.num_cameras, config.num_arms)
            self.reset()

    def get_config(self) -> DataConfig:
        return self._config

    def set_ensemble_nums(self, n: int) -> None:
        """How many trajectories are blended from now on; 0: none."""
        with self._lock:
            self._num_ensemble = n
            for ensembler in self._ensemblers:
                ensembler.resize(n)

    def reset(self) -> None:
        """Forget frames and past trajectories; prompt and config stay."""
        with self._lock:
            self._frames.clear()
            self._ensemblers.clear()

    # -- frames ----------------------------------------------------------------------------------------------------

    def add_obs_frame(self, obs_frame: dict[str, Any]) -> None:
        """Hand over the newest frame; see :func:`apt.infer.frames.parse_frame` for its form.

        Raises:
            ValueError: names the key that is missing or wrong; the planner is unchanged.
        """
        with self._lock:
            frame = parse_frame(obs_frame, self._config)
            if self._frames:
                last = self._frames[-1]
                if frame.timestamp <= last.timestamp:
                    raise ValueError(
                        f"timestamp {frame.timestamp} is not later than the previous frame's {last.timestamp}; "
                        "reset() before a new episode"
                    )
                if len(frame.world_from_ee) != len(last.world_from_ee):
                    raise ValueError(
                        f"ee_pose has {len(frame.world_from_ee)} arms, earlier frames {len(last.world_from_ee)}"
                    )
            self._frames.append(frame)
            self._drop_old_frames()

    def _step(self, frames: list[RobotFrame]) -> float | None:
        """Seconds per sampling gap; None while a single frame cannot tell."""
        config = self._config
        if config.sample_dt is not None or config.record_dt is not None:
            return config.sample_dt if config.sample_dt is not None else config.record_dt
        if len(frames) < 2:
            return None
        return (frames[-1].timestamp - frames[0].timestamp) / (len(frames) - 1)

    def _drop_old_frames(self) -> None:
        step = self._step(list(self._frames))
        if step is None:
            return
        now = self._frames[-1].timestamp
        needed = min(observed_times(self._config, now, step)[0], history_times(self._config, now, step)[0])
        # One frame before the window stays, to interpolate from; two stay where the time step is measured.
        fewest = 1 if self._config.sample_dt or self._config.record_dt else 2
        while len(self._frames) > fewest and self._frames[1].timestamp <= needed:
            self._frames.popleft()

    # -- planning --------------------------------------------------------------------------------------------------

    def get_action(
        self, sample_num: int = 1, draw_traj: bool = False, compress_traj_img: bool = False
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray | bytes | None] | None:
        """Plan from the newest frame.

        Args:
            sample_num: S, trajectories to sample.
            draw_traj: also draw them on every camera.
            compress_traj_img: the drawing as JPEG bytes.
        Returns:
            None before the first frame; else poses (S, Ta, Nee, 4, 4) ``world_from_ee``, openness (S, Ta, Nee), times
            (Ta,) in the frames' clock, and the drawing, (H, W, 3) uint8 RGB or bytes, or None. Each sample is blended
            with those of its index in the last queries.
        Raises:
            ValueError: no prompt was set, or a single frame cannot tell the time step.
        """
        with self._query:
            with self._lock:
                if not self._frames:
                    return None
                frames, config, prompt, collate = list(self._frames), self._config, self._prompt, self._collate
            if prompt is None:
                raise ValueError("no instruction yet: call set_prompt first")
            step = self._step(frames)
            if step is None:
                raise ValueError(
                    "one frame cannot tell the time step and the config sets neither sample_dt nor record_dt; "
                    "add a second frame, or set_config one with sample_dt"
                )
            sample = self._sample(frames, config, prompt, step)
            states = self._predict(collate([sample] * sample_num).observation)  # (S, Ta, Nee, 17)
            arms = frames[-1].world_from_ee.shape[0]
            poses = robot_from_policy_ee(states[..., :16].reshape(*states.shape[:-1], 4, 4)[:, :, :arms], config)
            grippers = np.clip(states[:, :, :arms, 16], 0.0, 1.0)
            times = future_times(config, frames[-1].timestamp, step)
            with self._lock:
                if self._num_ensemble > 0:
                    blended = [self._blend(i, poses[i], grippers[i], times) for i in range(sample_num)]
                    poses, grippers = (np.stack(part) for part in zip(*blended, strict=True))
            image = self._draw(frames[-1], poses, grippers) if draw_traj else None
            if image is not None and compress_traj_img:
                image = cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR))[1].tobytes()
            return poses, grippers, times, image

    def ensemble_traj(
        self, poses: np.ndarray, grippers: np.ndarray, times: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Blend a trajectory (Ta, Nee, 4, 4), (Ta, Nee), (Ta,) of one's own into the planner's first ensemble."""
        with self._lock:
            return self._blend(0, poses, grippers, times)

    def _blend(self, index: int, poses, grippers, times) -> tuple[np.ndarray, np.ndarray]:
        while len(self._ensemblers) <= index:
            self._ensemblers.append(TrajectoryEnsembler(self._num_ensemble))
        return self._ensemblers[index].add(times, poses, grippers)

    @staticmethod
    def _sample(frames: list[RobotFrame], config: DataConfig, prompt: str, step: float):
        times = np.array([frame.timestamp for frame in frames])
        now = times[-1]
        shown = nearest_index(times, observed_times(config, now, step))
        track = StateTrack(
            times,
            np.stack([frame.world_from_ee for frame in frames]),
            np.stack([frame.gripper for frame in frames]),
        )
        return make_sample(config, [frames[i].cameras for i in shown], track, now, prompt, step=step)

    def _predict(self, observation) -> np.ndarray:
        half = self.train_config.fp16 and self.device.type == "cuda"
        context = torch.autocast("cuda", dtype=torch.bfloat16) if half else contextlib.nullcontext()
        with torch.inference_mode(), context:
            states = self._model.predict(observation.to(self.device), steps=self._steps, generator=self._generator)
        return states.double().cpu().numpy()

    @staticmethod
    def _draw(frame: RobotFrame, poses: np.ndarray, grippers: np.ndarray) -> np.ndarray:
        """Every sample and arm on every camera, side by side at the first camera's height."""
        tiles = []
        for camera in frame.cameras.values():
            tile = camera.rgb
            for sample in range(len(poses)):
                for arm in range(poses.shape[2]):
                    positions = poses[sample, :, arm, :3, 3]
                    tile = draw_trajectory(tile, camera.K, camera.world_from_cam, positions, grippers[sample, :, arm])
            tiles.append(tile)
        height = tiles[0].shape[0]
        scaled = [cv2.resize(t, (round(t.shape[1] * height / t.shape[0]), height)) for t in tiles]
        return np.concatenate(scaled, axis=1)
