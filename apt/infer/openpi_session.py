"""What one client of openpi's protocol asks and is told: observations in, action chunks out, as plain maps."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from scipy.spatial.transform import Rotation

from apt.infer.contract import ObservationContract
from apt.infer.openpi_profile import ProfileReader
from apt.infer.service_session import PolicyService
from data_utils.geometry.resample import at_control_steps

ROW = "per arm: position (m, 3), rotation vector (3), openness (0 closed, 1 open), all in the frames' world"
DELTA_ROW = (
    "per control step, open loop: shares of the profile's translation (3) and rotation (3), 1 closes and -1 opens"
)
JUMP = 0.3  # m that no arm goes between two queries
OWN_KEYS = ("prompt", "reset", "seed", "timestamp")


class Clock:
    """Moments of frames that do not say theirs: openpi's clients send none.

    Args:
        contract: of the policy, whose unit and time step they are in.
        step: between two observations; None: the time that passes, and a time step at least.
        now: seconds, increasing.
    """

    def __init__(
        self, contract: ObservationContract, step: float | None, now: Callable[[], float] = time.monotonic
    ) -> None:
        self._contract, self._step, self._now = contract, step, now
        self._last: float | None = None

    def moment(self) -> tuple[float, bool]:
        """Of an observation that has just come, and whether an episode begins with it: after a pause longer than a
        chunk nothing of the last one goes on."""
        last, now = self._last, self._now()
        if last is None:
            self._last = 0.0 if self._step is not None else now
            return self._last, False
        self._last = last + self._step if self._step is not None else max(now, last + (self._contract.time_step or 0.0))
        longest = self._contract.chunk_length
        return self._last, longest is not None and self._last - last > longest


class OpenpiSession:
    """One connection's planner session.

    Observations are this library's frames (:func:`apt.infer.frames.parse_frame`) as nested maps, with ``prompt`` beside
    the cameras and optionally ``reset`` (true: a new episode begins), ``seed`` (of its noise) and ``timestamp``.

    Args:
        clock_step: see :class:`Clock`.
        profile: what else observations are, whose prompt alone may stand beside ``reset``, ``seed`` and ``timestamp``.
            Another prompt than the last, or a jump of the arm, begins an episode: such programs tell of none.
    """

    def __init__(
        self, service: PolicyService, clock_step: float | None = None, profile: ProfileReader | None = None
    ) -> None:
        self._service, self._profile = service, profile
        self._followed: tuple[str, np.ndarray] | None = None  # the last prompt, and where the arms were
        self._session = service.session()
        self._clock = Clock(service.contract(service.planner), clock_step)
        self._previous_ms: float | None = None

    def metadata(self) -> dict[str, Any]:
        """What a client is told before it asks."""
        identity = self._service.identity()
        return {
            "library": "apt-vla",
            "version": identity["version"],
            "checkpoint": identity["checkpoint"],
            "sampling": identity["sampling"],
            "contract": self._session.observation_contract(),
            "actions": ROW if self._deltas is None else DELTA_ROW,
            **({} if self._profile is None else {"profile": self._profile.name}),
        }

    def answer(self, observation: Any) -> dict[str, Any]:
        """The chunk for an observation.

        Returns:
            ``actions`` (T, 7 * arms) float32, rows as ``ROW`` or ``DELTA_ROW`` says; ``poses`` (T, arms, 4, 4) and
            ``grippers`` (T, arms); ``times`` (T,) in the frames' clock; ``server_timing`` and ``policy_timing`` in
            milliseconds.
        Raises:
            ValueError: names what is missing or wrong; the session is as it was, unless it was reset.
        """
        began = time.perf_counter()
        frame, prompt = self._taken_apart(observation)
        plan = self._session.run_inference(frame, prompt)
        poses, grippers = plan["poses"][0], plan["grippers"][0]  # (T, arms, 4, 4), (T, arms)
        times = np.asarray(plan["times"], np.float64)
        if self._deltas is not None:
            now = frame["timestamp"]
            steps, openness = at_control_steps(now, times, poses[:, 0].astype(np.float64), grippers[:, 0])
            actions = self._deltas(frame["ee_pose"][0], steps, openness)
            poses, grippers, times = steps[:, None], openness[:, None], now + 1.0 + np.arange(len(steps))
        else:
            actions = action_rows(poses, grippers)
        total_ms = 1e3 * (time.perf_counter() - began)
        timing = {"infer_ms": total_ms}
        if self._previous_ms is not None:
            timing["prev_total_ms"] = self._previous_ms
        self._previous_ms = total_ms
        return {
            "actions": actions,
            "poses": poses.astype(np.float32),
            "grippers": grippers.astype(np.float32),
            "times": times,
            "server_timing": timing,
            "policy_timing": {"infer_ms": 1e3 * sum(plan["timing"][part] for part in ("vlm", "prefix", "denoise"))},
        }

    def _taken_apart(self, observation: Any) -> tuple[dict[str, Any], str | None]:
        """Frame and instruction; what was asked besides is done."""
        if not isinstance(observation, Mapping):
            raise ValueError(f"the observation is a {type(observation).__name__}; wanted a map")
        prompt, reset, seed = (observation.get(key) for key in ("prompt", "reset", "seed"))
        if reset not in (None, True, False):
            raise ValueError(f"reset is {reset!r}; wanted true or false")
        if seed is not None and (isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or not reset):
            raise ValueError(f"seed is {seed!r}; wanted a whole number, beside reset: true")
        if self._profile is None:
            frame = {key: value for key, value in observation.items() if key not in OWN_KEYS}
        else:
            frame = self._profile.frame(observation)
            prompt = observation.get(self._profile.profile.prompt)
            reset = reset or self._begins(prompt, frame["ee_pose"])
        frame["timestamp"] = observation.get("timestamp")
        if frame["timestamp"] is None:
            frame["timestamp"], begins = self._clock.moment()
            reset = reset or begins
        if reset:
            self._session.reset(None if seed is None else int(seed))
        return frame, prompt

    @property
    def _deltas(self) -> Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray] | None:
        """What makes rows of deltas; None: rows are poses."""
        return None if self._profile is None or self._profile.profile.actions.kind == "poses" else self._profile.deltas

    def _begins(self, prompt: Any, world_from_ee: np.ndarray) -> bool:
        """Whether an observation of a profile is an episode's first, as far as can be told."""
        before, self._followed = self._followed, (prompt, world_from_ee)
        if before is None or before[0] != prompt or before[1].shape != world_from_ee.shape:
            return True
        return bool(np.linalg.norm((world_from_ee - before[1])[:, :3, 3], axis=1).max() > JUMP)


def action_rows(poses: np.ndarray, grippers: np.ndarray) -> np.ndarray:
    """(T, 7 * arms) float32 of ``world_from_ee`` (T, arms, 4, 4) and openness (T, arms); see ``ROW``."""
    steps, arms = grippers.shape
    turned = Rotation.from_matrix(poses[..., :3, :3].reshape(-1, 3, 3)).as_rotvec().reshape(steps, arms, 3)
    rows = np.concatenate([poses[..., :3, 3], turned, grippers[..., None]], axis=-1)
    return rows.reshape(steps, 7 * arms).astype(np.float32)
