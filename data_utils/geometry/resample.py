"""Robot states between recorded times: geodesic on SO(3), linear in R^3 and openness, clamped to the ends."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.spatial.transform import Rotation


def so3_log(rotation: np.ndarray) -> np.ndarray:
    """Rotation vectors (..., 3), radians, of rotation matrices (..., 3, 3)."""
    vectors = Rotation.from_matrix(rotation.reshape(-1, 3, 3)).as_rotvec()
    return vectors.reshape(*rotation.shape[:-2], 3)


def so3_exp(vector: np.ndarray) -> np.ndarray:
    """Rotation matrices (..., 3, 3) of rotation vectors (..., 3), radians."""
    matrices = Rotation.from_rotvec(vector.reshape(-1, 3)).as_matrix()
    return matrices.reshape(*vector.shape[:-1], 3, 3)


@dataclass(frozen=True)
class Bracket:
    """Where query times fall between recorded ones: made once, used for every track with these times."""

    before: np.ndarray  # (Q,) int64, index of the recorded time before each query
    fraction: np.ndarray  # (Q,) in [0, 1] of the way to the next

    @classmethod
    def of(cls, times: np.ndarray, query: np.ndarray) -> "Bracket":
        """``times`` (T,) with T >= 1 must not decrease; queries (Q,) outside clamp to the ends."""
        query = np.asarray(query, np.float64)
        if len(times) == 1:
            return cls(np.zeros(len(query), np.int64), np.zeros(len(query)))
        before = np.searchsorted(times, query, side="right") - 1
        before = np.minimum(np.maximum(before, 0), len(times) - 2)
        start = times[before]
        span = times[before + 1] - start
        # Equal neighbouring times have no way between them: the earlier one counts.
        fraction = (query - start) / np.where(span > 0, span, np.inf)
        return cls(before, np.minimum(np.maximum(fraction, 0.0), 1.0))

    def ends(self, track: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Values (Q, ...) float64 of a track (T, ...) at the recorded times before and after each query."""
        after = np.minimum(self.before + 1, len(track) - 1)
        return track[self.before].astype(np.float64), track[after].astype(np.float64)

    def poses(self, start: np.ndarray, end: np.ndarray) -> np.ndarray:
        """Poses (Q, ..., 4, 4) on the way from ``start`` to ``end``, :meth:`ends` of a track of poses."""
        # At recorded times the recorded pose itself, to the bit; only the rest is interpolated.
        at_end = self.fraction == 1
        result = np.where(at_end.reshape(-1, *[1] * (start.ndim - 1)), end, start) if at_end.any() else start.copy()
        between = np.flatnonzero((self.fraction > 0) & ~at_end)
        if len(between):
            start, end = start[between], end[between]
            part = self.fraction[between].reshape(-1, *[1] * (start.ndim - 2))  # (q, ..., 1)
            turn = so3_log(start[..., :3, :3].swapaxes(-1, -2) @ end[..., :3, :3])
            result[between, ..., :3, :3] = start[..., :3, :3] @ so3_exp(part * turn)
            result[between, ..., :3, 3] = start[..., :3, 3] + part * (end[..., :3, 3] - start[..., :3, 3])
        return result

    def values(self, start: np.ndarray, end: np.ndarray) -> np.ndarray:
        """Numbers (Q, ...) on the straight way from ``start`` to ``end``, :meth:`ends` of a track."""
        return start + self.fraction.reshape(-1, *[1] * (start.ndim - 1)) * (end - start)


def interpolate_poses(times: np.ndarray, poses: np.ndarray, query: np.ndarray) -> np.ndarray:
    """Poses at the query times.

    Args:
        times: (T,) seconds, not decreasing.
        poses: (T, ..., 4, 4).
        query: (Q,) seconds; outside ``times`` the nearest end counts.
    Returns:
        (Q, ..., 4, 4) float64
    """
    bracket = Bracket.of(times, query)
    return bracket.poses(*bracket.ends(poses))


def interpolate_values(times: np.ndarray, values: np.ndarray, query: np.ndarray) -> np.ndarray:
    """Linear interpolation: (T,) times and (T, ...) values at (Q,) query times, clamped; (Q, ...) float64."""
    bracket = Bracket.of(times, query)
    return bracket.values(*bracket.ends(values))


def at_control_steps(
    now: float, times: np.ndarray, poses: np.ndarray, openness: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """A chunk's targets for the control steps after ``now``: the step from t to t + 1 leads to what is told for t + 1.

    Args:
        now, times: (T,), in control steps.
        poses, openness: (T, 4, 4) and (T,) of one arm.
    Returns:
        (S, 4, 4) and (S,) for now + 1, now + 2, ... to the chunk's end; one at least.
    """
    steps = np.arange(now + 1, max(np.floor(times[-1]), now + 1) + 1)
    return interpolate_poses(times, poses, steps), interpolate_values(times, openness, steps)


def nearest_index(times: np.ndarray, query: np.ndarray) -> np.ndarray:
    """Index (Q,) of the recorded time nearest to each query time; of two equally near, the earlier."""
    query = np.asarray(query, np.float64)
    if len(times) == 1:
        return np.zeros(len(query), np.int64)
    after = np.clip(np.searchsorted(times, query, side="left"), 1, len(times) - 1)
    return np.where(query - times[after - 1] <= times[after] - query, after - 1, after)
