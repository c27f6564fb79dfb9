"""Blend the trajectories of the last few queries into one, so that successive predictions do not jerk the arm."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np

from data_utils.geometry.resample import interpolate_poses, interpolate_values, so3_exp, so3_log

OLDEST_WEIGHT = 0.1


@dataclass(frozen=True)
class _Trajectory:
    times: np.ndarray  # (T,) seconds, increasing
    world_from_ee: np.ndarray  # (T, Nee, 4, 4)
    openness: np.ndarray  # (T, Nee)


class TrajectoryEnsembler:
    """Keeps the last ``n`` trajectories as they were predicted and returns weighted means at the newest one's times.

    The m kept trajectories weigh ``linspace(0.1, 1, m)`` from oldest to newest; an older one counts at time q while
    ``first time <= q < last time``. With ``n`` 0 or 1 the input is returned unchanged.
    """

    def __init__(self, n: int) -> None:
        self._kept: deque[_Trajectory] = deque()
        self.resize(n)

    def __len__(self) -> int:
        return len(self._kept)

    def resize(self, n: int) -> None:
        """Keep ``n`` trajectories from now on, forgetting the oldest where more are kept."""
        if n < 0:
            raise ValueError(f"ensemble size is {n}; wanted 0 (off) or more")
        self.n = n
        while len(self._kept) > n:
            self._kept.popleft()

    def reset(self) -> None:
        """Forget every trajectory."""
        self._kept.clear()

    def add(self, times: np.ndarray, world_from_ee: np.ndarray, openness: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Take in the newest trajectory and return the ensemble at its times.

        Args:
            times: (T,) seconds, increasing.
            world_from_ee: (T, Nee, 4, 4).
            openness: (T, Nee).
        Returns:
            world_from_ee (T, Nee, 4, 4) and openness (T, Nee), float64 where anything was blended.
        Raises:
            ValueError: shapes that disagree, values that are not finite, times that do not increase.
        """
        newest = _checked(times, world_from_ee, openness)
        if self.n == 0:
            return newest.world_from_ee, newest.openness
        if self._kept and self._kept[-1].openness.shape[1] != newest.openness.shape[1]:
            raise ValueError(
                f"the trajectory has {newest.openness.shape[1]} arms, earlier ones "
                f"{self._kept[-1].openness.shape[1]}; reset the ensembler when the robot changes"
            )
        while self._kept and self._kept[0].times[-1] < newest.times[0]:
            self._kept.popleft()
        self._kept.append(newest)
        if len(self._kept) > self.n:
            self._kept.popleft()
        if len(self._kept) == 1:
            return newest.world_from_ee, newest.openness
        return self._blend(newest)

    def _blend(self, newest: _Trajectory) -> tuple[np.ndarray, np.ndarray]:
        query = newest.times
        weights = np.linspace(OLDEST_WEIGHT, 1.0, len(self._kept))  # (m,)
        counts = np.stack([(t.times[0] <= query) & (query < t.times[-1]) for t in self._kept])  # (m, T)
        counts[-1] = True
        weights = weights[:, None] * counts
        weights = weights / weights.sum(0)  # (m, T)
        poses = np.stack([interpolate_poses(t.times, t.world_from_ee, query) for t in self._kept])  # (m, T, Nee, 4, 4)
        openness = np.stack([interpolate_values(t.times, t.openness, query) for t in self._kept])  # (m, T, Nee)

        blended = np.array(newest.world_from_ee, np.float64)
        blended[..., :3, 3] = np.einsum("mt,mtad->tad", weights, poses[..., :3, 3])
        newest_rotation = blended[..., :3, :3].copy()  # (T, Nee, 3, 3)
        turns = so3_log(newest_rotation.swapaxes(-1, -2) @ poses[..., :3, :3])  # (m, T, Nee, 3)
        blended[..., :3, :3] = newest_rotation @ so3_exp(np.einsum("mt,mtad->tad", weights, turns))
        return blended, np.einsum("mt,mta->ta", weights, openness)


def _checked(times: np.ndarray, world_from_ee: np.ndarray, openness: np.ndarray) -> _Trajectory:
    times, world_from_ee, openness = np.array(times, np.float64), np.array(world_from_ee), np.array(openness)
    if times.ndim != 1 or len(times) == 0:
        raise ValueError(f"times have shape {times.shape}; wanted (T,) with T >= 1")
    if openness.ndim != 2 or len(openness) != len(times):
        raise ValueError(f"openness has shape {openness.shape}; wanted ({len(times)}, Nee)")
    if world_from_ee.shape != (*openness.shape, 4, 4):
        raise ValueError(f"poses have shape {world_from_ee.shape}; wanted {(*openness.shape, 4, 4)}")
    for name, values in (("times", times), ("poses", world_from_ee), ("openness", openness)):
        if not np.isfinite(values).all():
            raise ValueError(f"{name} of the trajectory are not finite")
    if (np.diff(times) <= 0).any():
        raise ValueError("times of the trajectory do not increase")
    return _Trajectory(times, world_from_ee, openness)
