"""From camera frames to a trajectory: ``TrajPlanner``, the policy as a robot program uses it."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch

from apt.infer.contract import ObservationContract
from apt.infer.frame_window import FrameWindow, blank_sample
from apt.infer.plan import Plan, Timing
from apt.infer.policy import Policy
from apt.infer.realtime_chunking import Chunk, RealTimeChunking, guide_from_chunk
from data_utils.batches.collate import Collator
from data_utils.config import DataConfig
from data_utils.datasets import get_dataset_class
from data_utils.samples.observation import future_times, robot_from_policy_ee
from infer_utils.draw_traj import draw_plan
from infer_utils.trajectory_ensembler import TrajectoryEnsembler
from train_utils.errors import ConfigError


class TrajPlanner:
    """Plans end-effector trajectories from the newest frames: one session on a policy.

    Thread-safe: one thread may add frames while another asks for actions. Frames go through the same code as training
    samples (:func:`data_utils.samples.observation.make_sample`). Sessions on one policy (:meth:`session`) are served
    one query at a time, in the order of asking.

    Args:
        ckpt_path: a run's ``ckpt_*.pt``, its configuration beside it, or an exported folder.
        device: where the policy runs; None: the first GPU where there is one, else the CPU.
        ensemble: trajectories that are blended into the returned one; 0: none.
        use_ema: use the averaged weights.
        seed: of the diffusion noise.
        steps: denoising steps; None: 20, under flow matching 10 (arch gr00t: 4).
        sampler: ``ddim``, or ``dpm`` for few steps (8 to 10); under flow matching ``euler``. None: the first.
        compile: ``none``, ``compile`` or ``graphs``; see :class:`apt.infer.policy.Policy` and :meth:`warm_up`.
        chunking: real-time chunking instead of ensembling, which must be 0 then.
    Raises:
        CheckpointError, CheckpointMismatch: see :func:`apt.infer.loading.load_policy`.
        ValueError: a device that is not there, ensembling and real-time chunking at once, an unknown sampler.
    """

    def __init__(
        self,
        ckpt_path: str | Path,
        device: str | torch.device | None = None,
        ensemble: int = 4,
        use_ema: bool = False,
        seed: int = 0,
        steps: int | None = None,
        sampler: str | None = None,
        compile: str = "none",
        chunking: RealTimeChunking | None = None,
    ) -> None:
        policy = Policy.load(ckpt_path, device, use_ema, compile)
        self._start(policy, ensemble, seed, steps, sampler, chunking, None)

    @classmethod
    def of_policy(
        cls,
        policy: Policy,
        ensemble: int = 4,
        seed: int = 0,
        steps: int | None = None,
        sampler: str | None = None,
        chunking: RealTimeChunking | None = None,
        config: str | dict | DataConfig | None = None,
    ) -> "TrajPlanner":
        """A session on a policy that is loaded already; ``config`` as in :meth:`set_config`, None: the trained one."""
        planner = cls.__new__(cls)
        planner._start(policy, ensemble, seed, steps, sampler, chunking, config)
        return planner

    def session(self, seed: int | None = None) -> "TrajPlanner":
        """Another session on the same policy, with this one's settings and config, and frames, instruction,
        trajectories and noise (from ``seed``; None: this one's) of its own."""
        with self._lock:
            return self.of_policy(
                self.policy,
                self._num_ensemble,
                self._seed if seed is None else seed,
                self._steps,
                self._sampler,
                self._chunking,
                self._config,
            )

    def _start(
        self,
        policy: Policy,
        ensemble: int,
        seed: int,
        steps: int | None,
        sampler: str | None,
        chunking: RealTimeChunking | None,
        config: str | dict | DataConfig | None,
    ) -> None:
        self.policy = policy
        policy.schedule(steps, sampler)  # checks them
        self._steps = steps
        self._sampler = policy.samplers[0] if sampler is None else sampler
        self._seed, self._generator = seed, policy.generator(seed)
        self._lock = threading.RLock()  # guards everything below
        self._prompt: str | None = None
        self._ensemblers: list[TrajectoryEnsembler] = []
        self._executed: Chunk | None = None  # the last query's first sample
        self._resets = 0  # a query that was overtaken by a reset leaves no trace
        self._num_ensemble, self._chunking = 0, None
        self.set_config(policy.train_config.data_configs()[0] if config is None else config)
        self.set_ensemble_nums(ensemble)
        self.set_chunking(chunking)
        self.last_timing: Timing | None = None

    @property
    def device(self) -> torch.device:
        return self.policy.device

    @property
    def train_config(self):
        """The configuration the policy was trained with."""
        return self.policy.train_config

    @property
    def prompt(self) -> str | None:
        """The instruction; None before the first."""
        return self._prompt

    # -- settings --------------------------------------------------------------------------------------------------

    @property
    def sampling(self) -> dict[str, Any]:
        """What shapes a trajectory beside weights, frames and noise, as plain data."""
        with self._lock:
            chunking = None if self._chunking is None else dataclasses.asdict(self._chunking)
            return {
                "ensemble": self._num_ensemble,
                "steps": self._steps,
                "sampler": self._sampler,
                "chunking": chunking,
            }

    def set_prompt(self, prompt: str) -> None:
        """The instruction from now on. Raises ``ValueError`` for what is no text, or an empty one."""
        _check_text(prompt)
        with self._lock:
            self._prompt = prompt

    def set_config(self, config: str | dict | DataConfig) -> None:
        """Cameras, arms and times: the name of a dataset the policy was trained on, or, for another robot, a
        ``DataConfig`` or its dictionary. Forgets frames.

        Raises:
            ValueError: an unknown name or field, a dataset that the policy was not trained on, or history and future
                lengths that it was not trained with.
        """
        if isinstance(config, str):
            config = self._trained_config(config)
        elif isinstance(config, dict):
            config = DataConfig.from_dict(config)
        trained = self.policy.model.config
        if (config.num_history, config.num_future) != (trained.num_history, trained.num_future):
            raise ConfigError(
                f"the config has {config.num_history} history and {config.num_future} future states, the policy was "
                f"trained with {trained.num_history} and {trained.num_future}"
            )
        collate = self._collator(config, self.policy.pad_multiple)
        with self._lock:
            _check_delay(self._chunking, config)
            self._config, self._collate = config, collate
            self.reset()

    def _trained_config(self, name: str) -> DataConfig:
        """As training had it, image size included. Raises ``ValueError``."""
        get_dataset_class(name)  # an unknown name is another mistake than an untrained one
        trained = dict(zip(self.train_config.dataset_classes, self.train_config.data_configs(), strict=True))
        if name not in trained:
            raise ConfigError(
                f"the policy was not trained on {name}; it was on {', '.join(trained)}: name one of these, or give the "
                "cameras, arms and times of a robot that is like them as a DataConfig (a dictionary will do)"
            )
        return trained[name]

    def get_config(self) -> DataConfig:
        return self._config

    def set_ensemble_nums(self, n: int) -> None:
        """How many trajectories are blended from now on; 0: none. Raises ``ValueError``."""
        if isinstance(n, bool) or not isinstance(n, (int, np.integer)) or n < 0:
            raise ValueError(f"ensemble size is {n!r}; wanted 0 (off) or more")
        with self._lock:
            self._check_one_smoothing(n, self._chunking)
            self._num_ensemble = int(n)
            for ensembler in self._ensemblers:
                ensembler.resize(self._num_ensemble)

    def set_chunking(self, chunking: RealTimeChunking | None) -> None:
        """Let every chunk go on from the last one (real-time chunking); None: not.

        Raises:
            ValueError: there is an ensemble, or the delay is not shorter than a chunk (where the time step is measured
                from the frames, the next query says so).
        """
        if chunking is not None and not isinstance(chunking, RealTimeChunking):
            raise ValueError(f"chunking is a {type(chunking).__name__}; wanted RealTimeChunking or None")
        with self._lock:
            self._check_one_smoothing(self._num_ensemble, chunking)
            _check_delay(chunking, self._config)
            self._chunking, self._executed = chunking, None

    @staticmethod
    def _check_one_smoothing(ensemble: int, chunking: RealTimeChunking | None) -> None:
        if ensemble > 0 and chunking is not None:
            raise ValueError(
                f"real-time chunking and an ensemble of {ensemble} exclude each other: blending would undo the frozen "
                "steps; set the ensemble to 0, or chunking to None"
            )

    def reset(self, seed: int | None = None) -> None:
        """Forget frames and past trajectories; prompt and config stay. With ``seed``, noise begins anew from there."""
        with self._lock:
            if seed is not None:
                self._generator = self.policy.generator(seed)
            self._window = FrameWindow(self._config)
            self._ensemblers.clear()
            self._executed = None
            self._resets += 1

    # -- frames ----------------------------------------------------------------------------------------------------

    def add_obs_frame(self, obs_frame: dict[str, Any]) -> None:
        """Hand over the newest frame; see :func:`apt.infer.frames.parse_frame` for its form.

        Raises:
            ValueError: names the key that is missing or wrong; the planner is unchanged.
        """
        self.add_obs_frames([obs_frame])

    def add_obs_frames(self, obs_frames: Sequence[dict[str, Any]]) -> None:
        """Hand over several frames, oldest first: all of them, or none where one raises ``ValueError``."""
        with self._lock:
            self._window.add(obs_frames)

    # -- planning --------------------------------------------------------------------------------------------------

    def get_action(
        self,
        sample_num: int = 1,
        draw_traj: bool = False,
        compress_traj_img: bool = False,
        *,
        steps: int | None = None,
        sampler: str | None = None,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray | bytes | None] | None:
        """Plan from the newest frame.

        Args:
            sample_num: S, trajectories to sample.
            draw_traj: also draw them on every camera.
            compress_traj_img: the drawing as JPEG bytes.
            steps, sampler: of denoising, for this query; None: the planner's.
        Returns:
            None before the first frame; else poses (S, Ta, Nee, 4, 4) ``world_from_ee``, openness (S, Ta, Nee), times
            (Ta,) in the frames' clock, and the drawing, (H, W, 3) uint8 RGB or bytes, or None. Each sample is blended
            with those of its index in the last queries.
        Raises:
            ValueError: no prompt was set, or a single frame cannot tell the time step.
        """
        plan = self.run_inference(None, None, sample_num, draw_traj, compress_traj_img, steps=steps, sampler=sampler)
        return None if plan is None else (plan.poses, plan.grippers, plan.times, plan.image)

    def run_inference(
        self,
        frames: dict[str, Any] | Sequence[dict[str, Any]] | None = None,
        prompt: str | None = None,
        sample_num: int = 1,
        draw_traj: bool = False,
        compress_traj_img: bool = False,
        *,
        steps: int | None = None,
        sampler: str | None = None,
    ) -> Plan | None:
        """A whole query: take in frames and an instruction, then plan.

        Args:
            frames: the newest frame, or several, oldest first; None: those that were added.
            prompt: the instruction from now on; None: the one that was set.
            others: see :meth:`get_action`.
        Returns:
            What :meth:`get_action` does, with the query's timing; that stays in ``last_timing`` too.
        Raises:
            ValueError: as :meth:`get_action` and :meth:`add_obs_frame`; the planner is unchanged where a frame, the
                instruction or an argument is wrong.
        """
        if isinstance(sample_num, bool) or not isinstance(sample_num, (int, np.integer)) or sample_num < 1:
            raise ValueError(f"sample_num is {sample_num!r}; wanted 1 or more")
        steps, sampler = self._steps if steps is None else steps, self._sampler if sampler is None else sampler
        self.policy.schedule(steps, sampler)  # checked before anything is changed
        with self._lock:
            if frames is not None:
                _check_prompt(self._prompt if prompt is None else prompt)
                self.add_obs_frames(frames if isinstance(frames, (list, tuple)) else [frames])
            if prompt is not None:
                self.set_prompt(prompt)
        began = time.perf_counter()
        # The frames are looked at when the turn has come: they would be old by then.
        with self.policy.turn() as wait:
            with self._lock:
                if not self._window:
                    return None
                window, prompt, collate = self._window.copy(), self._prompt, self._collate
                chunking, executed, resets = self._chunking, self._executed, self._resets
            _check_prompt(prompt)
            config, newest, step = window.config, window.newest, window.time_step
            if step is None:
                raise ValueError(
                    "one frame cannot tell the time step and the config sets neither sample_dt nor record_dt; "
                    "add a second frame, or set_config one with sample_dt"
                )
            preparing = time.perf_counter()
            now = newest.timestamp
            times = future_times(config, now, step)
            observation = collate([window.sample(prompt, step)]).observation
            guide = None
            if chunking is not None:
                chunking.check_fits(times[-1] - now, ObservationContract(config).time_unit)
            if chunking is not None and executed is not None:
                guide = guide_from_chunk(chunking, executed, times, now, observation)
            prepared = time.perf_counter()
            states, seconds = self.policy.infer(
                observation, self._generator, int(sample_num), steps, sampler, guide
            )  # (S, Ta, Nee, 17)
            with self._lock:
                forgotten = resets != self._resets
                arms = newest.world_from_ee.shape[0]
                poses = robot_from_policy_ee(states[..., :16].reshape(*states.shape[:-1], 4, 4)[:, :, :arms], config)
                grippers = np.clip(states[:, :, :arms, 16], 0.0, 1.0)
                if not forgotten and self._num_ensemble > 0:
                    blended = [self._blend(i, poses[i], grippers[i], times) for i in range(sample_num)]
                    poses, grippers = (np.stack(part) for part in zip(*blended, strict=True))
                if not forgotten and self._chunking is not None:
                    self._executed = Chunk(times, states[0])
        image = draw_plan(newest.cameras.values(), poses, grippers) if draw_traj else None
        if image is not None and compress_traj_img:
            image = cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR))[1].tobytes()
        timing = Timing(
            wait=wait,
            preprocess=prepared - preparing + seconds["transfer"],
            vlm=seconds["vlm"],
            prefix=seconds["prefix"],
            denoise=seconds["denoise"],
            total=time.perf_counter() - began,
        )
        self.last_timing = timing
        return Plan(poses, grippers, times, image, timing)

    def warm_up(
        self,
        sample_num: int = 1,
        prompt_tokens: int = 64,
        steps: int | None = None,
        sampler: str | None = None,
    ) -> None:
        """Plan from blank images, so that the first real query finds everything compiled, recorded and cached.

        Args:
            sample_num: of the queries to come; another number is another shape.
            prompt_tokens: instructions of up to about this many tokens (an English word takes one or two) find their
                shape ready.
            steps, sampler: of the queries to come, as in :meth:`get_action`.
        """
        steps, sampler = self._steps if steps is None else steps, self._sampler if sampler is None else sampler
        with self._lock:
            config, chunking = self._config, self._chunking
        sample = blank_sample(config)
        shortest = self._collator(config, 1)([sample]).observation
        bucket = self.policy.pad_multiple
        first = -(-shortest.input_ids.shape[1] // bucket)
        last = first if bucket == 1 else -(-(shortest.input_ids.shape[1] + prompt_tokens) // bucket)
        generator = self.policy.generator(0)
        for number in range(first, last + 1):
            observation = self._collator(config, number * bucket)([sample]).observation
            guides = [None]
            if chunking is not None:
                times = future_times(config, 0.0, 1.0)
                rest = Chunk(times, np.repeat(sample.history[-1:], len(times), axis=0))
                guides.append(guide_from_chunk(RealTimeChunking(0.0), rest, times, 0.0, observation))
            for guide in guides:
                with self.policy.turn():
                    self.policy.infer(observation, generator, sample_num, steps, sampler, guide)

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

    def _collator(self, config: DataConfig, pad_multiple: int) -> Collator:
        tokenize = self.policy.prompt_tokenizer(config.image_hw)
        return Collator(tokenize, tokenize.pad_id, config.num_cameras, config.num_arms, pad_multiple)


def _check_delay(chunking: RealTimeChunking | None, config: DataConfig) -> None:
    """Where the length of a chunk is known before the frames are. Raises ``ValueError``."""
    contract = ObservationContract(config)
    if chunking is not None and contract.chunk_length is not None:
        chunking.check_fits(contract.chunk_length, contract.time_unit)


def _check_prompt(prompt: Any) -> None:
    if prompt is None:
        raise ValueError("no instruction yet: call set_prompt first")
    _check_text(prompt)


def _check_text(prompt: Any) -> None:
    if not isinstance(prompt, str):
        raise ValueError(
            f"the prompt is {prompt!r:.80}, a {type(prompt).__name__}; wanted a text, such as 'open the door'"
        )
    if not prompt.strip():
        raise ValueError(f"the prompt is empty ({prompt!r:.80}); wanted a text, such as 'open the door'")
