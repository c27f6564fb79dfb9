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

from apt.infer.batching import Request
from apt.infer.frame_window import FrameWindow
from apt.infer.plan import Plan, Timing
from apt.infer.policy import Policy
from apt.infer.query import Query, collator
from apt.infer.realtime_chunking import Chunk, RealTimeChunking
from apt.infer.settings import PlannerSettings, data_config, planner_settings
from apt.infer.turns import FairLock
from apt.infer.warming import warm_up
from data_utils.config import DataConfig
from data_utils.prompts import check_prompt
from data_utils.samples.observation import robot_from_policy_ee
from infer_utils.draw_traj import draw_plan
from infer_utils.trajectory_ensembler import TrajectoryEnsembler


class TrajPlanner:
    """Plans end-effector trajectories from the newest frames: one session on a policy.

    Thread-safe: one thread may add frames while another asks for actions. Frames go through the same code as training
    samples (:func:`data_utils.samples.observation.make_sample`). Sessions on one policy (:meth:`session`) are served
    in the order of asking, those that wait together in one pass (:mod:`apt.infer.batching`).

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
        self._start(policy, planner_settings(policy, ensemble, seed, steps, sampler, chunking, None))

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
        planner._start(policy, planner_settings(policy, ensemble, seed, steps, sampler, chunking, config))
        return planner

    def session(self, seed: int | None = None) -> "TrajPlanner":
        """Another session on the same policy, with this one's settings and config, and frames, instruction,
        trajectories and noise (from ``seed``; None: this one's) of its own."""
        planner = type(self).__new__(type(self))
        with self._lock:
            settings = self._settings
        planner._start(self.policy, settings if seed is None else dataclasses.replace(settings, seed=seed))
        return planner

    def _start(self, policy: Policy, settings: PlannerSettings) -> None:
        self.policy = policy
        self._querying = FairLock()  # one query at a time: each begins with what the last one led to
        self._lock = threading.RLock()  # guards everything below
        self._settings = settings
        self._generator = policy.generator(settings.seed)
        self._prompt: str | None = None
        self._ensemblers: list[TrajectoryEnsembler] = []
        self._resets = 0  # a query that was overtaken by a reset leaves no trace
        self._collate = collator(policy, settings.config, policy.pad_multiple)
        self.reset()
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
            settings = self._settings
        return {
            "ensemble": settings.ensemble,
            "steps": settings.steps,
            "sampler": settings.sampler,
            "chunking": None if settings.chunking is None else dataclasses.asdict(settings.chunking),
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
        config = data_config(self.policy, config)
        collate = collator(self.policy, config, self.policy.pad_multiple)
        with self._lock:
            self._settings = dataclasses.replace(self._settings, config=config)
            self._collate = collate
            self.reset()

    def get_config(self) -> DataConfig:
        return self._settings.config

    def set_ensemble_nums(self, n: int) -> None:
        """How many trajectories are blended from now on; 0: none. Raises ``ValueError``."""
        with self._lock:
            self._settings = dataclasses.replace(self._settings, ensemble=n)
            for ensembler in self._ensemblers:
                ensembler.resize(self._settings.ensemble)

    def set_chunking(self, chunking: RealTimeChunking | None) -> None:
        """Let every chunk go on from the last one (real-time chunking); None: not.

        Raises:
            ValueError: there is an ensemble, or the delay is not shorter than a chunk (where the time step is measured
                from the frames, the next query says so).
        """
        with self._lock:
            self._settings = dataclasses.replace(self._settings, chunking=chunking)
            self._executed = None

    def reset(self, seed: int | None = None) -> None:
        """Forget frames and past trajectories; prompt and config stay. With ``seed``, noise begins anew from there."""
        with self._lock:
            if seed is not None:
                self._generator = self.policy.generator(seed)
            self._window = FrameWindow(self._settings.config)
            self._ensemblers.clear()
            self._executed: Chunk | None = None  # the last query's first sample
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
        steps, sampler = self._denoising(steps, sampler)
        self.policy.schedule(steps, sampler)  # checked before anything is changed
        self._take_in(frames, prompt)
        began = time.perf_counter()
        with self._querying:
            asked: tuple[Query, np.ndarray] | None = None

            def prepare() -> Request | None:
                # The frames are looked at when the turn has come: they would be old by then.
                nonlocal asked
                query = self._look()
                if query is None:
                    return None
                observation, times, guide = query.prepare()
                asked = query, times
                return self.policy.request(
                    observation, self._generator, int(sample_num), steps, sampler, guide, query.collate.pad_id
                )

            answer = self.policy.queue.ask(self, prepare)
            if answer is None:
                return None
            query, times = asked
            poses, grippers = self._finish(query, answer.states, times)
        image = draw_plan(query.window.newest.cameras, poses, grippers) if draw_traj else None
        if image is not None and compress_traj_img:
            image = cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR))[1].tobytes()
        timing = Timing(
            wait=answer.wait,
            preprocess=answer.prepare + answer.seconds["transfer"],
            vlm=answer.seconds["vlm"],
            prefix=answer.seconds["prefix"],
            denoise=answer.seconds["denoise"],
            total=time.perf_counter() - began,
        )
        self.last_timing = timing
        return Plan(poses, grippers, times, image, timing)

    def _denoising(self, steps: int | None, sampler: str | None) -> tuple[int | None, str]:
        """A query's own, or the planner's."""
        settings = self._settings
        return settings.steps if steps is None else steps, settings.sampler if sampler is None else sampler

    def _take_in(self, frames: dict[str, Any] | Sequence[dict[str, Any]] | None, prompt: str | None) -> None:
        with self._lock:
            if frames is not None:
                _check_prompt(self._prompt if prompt is None else prompt)
                self.add_obs_frames(frames if isinstance(frames, (list, tuple)) else [frames])
            if prompt is not None:
                self.set_prompt(prompt)

    def _look(self) -> Query | None:
        """All that a query depends on, as it is now; None before the first frame."""
        with self._lock:
            if not self._window:
                return None
            query = Query(
                self._window.copy(), self._prompt, self._collate, self._settings.chunking, self._executed, self._resets
            )
        _check_prompt(query.prompt)
        return query

    def _finish(self, query: Query, states: np.ndarray, times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Poses (S, Ta, Nee, 4, 4) and openness (S, Ta, Nee) of the robot, blended with the last queries', which
        remember them unless the planner was reset meanwhile."""
        newest, config = query.window.newest, query.window.config
        arms = newest.world_from_ee.shape[0]
        poses = robot_from_policy_ee(states[..., :16].reshape(*states.shape[:-1], 4, 4)[:, :, :arms], config)
        grippers = np.clip(states[:, :, :arms, 16], 0.0, 1.0)
        with self._lock:
            if query.resets != self._resets:
                return poses, grippers
            if self._settings.ensemble > 0:
                blended = [self._blend(i, poses[i], grippers[i], times) for i in range(len(poses))]
                poses, grippers = (np.stack(part) for part in zip(*blended, strict=True))
            if self._settings.chunking is not None:
                self._executed = Chunk(times, states[0])
        return poses, grippers

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
        with self._lock:
            settings = self._settings
        chunked = settings.chunking is not None
        warm_up(self.policy, settings.config, sample_num, prompt_tokens, *self._denoising(steps, sampler), chunked)

    def ensemble_traj(
        self, poses: np.ndarray, grippers: np.ndarray, times: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Blend a trajectory (Ta, Nee, 4, 4), (Ta, Nee), (Ta,) of one's own into the planner's first ensemble."""
        with self._lock:
            return self._blend(0, poses, grippers, times)

    def _blend(self, index: int, poses, grippers, times) -> tuple[np.ndarray, np.ndarray]:
        while len(self._ensemblers) <= index:
            self._ensemblers.append(TrajectoryEnsembler(self._settings.ensemble))
        return self._ensemblers[index].add(times, poses, grippers)


def _check_prompt(prompt: Any) -> None:
    if prompt is None:
        raise ValueError("no instruction yet: call set_prompt first")
    _check_text(prompt)


def _check_text(prompt: Any) -> None:
    try:
        check_prompt(prompt)
    except ValueError as error:
        raise ValueError(f"the prompt {error}") from error
