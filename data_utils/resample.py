"""Robot states between recorded times: geodesic on SO(3), linear in R^3 and openness, clamped to the ends."""

from __future__ import annotations

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


def bracket(times: np.ndarray, query: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where each query time falls: the index (Q,) of the recorded time before it, and the fraction (Q,) in [0, 1].

    ``times`` (T,) with T >= 1 must not decrease. Queries outside clamp to the ends.
    """
    if len(times) == 1:
        return np.zeros(len(query), np.int64), np.zeros(len(query))
    query = np.clip(query, times[0], times[-1])
    before = np.clip(np.searchsorted(times, query, side="right") - 1, 0, len(times) - 2)
    span = times[before + 1] - times[before]
    fraction = np.divide(query - times[before], span, out=np.zeros(len(query)), where=span > 0)
    return before, np.clip(fraction, 0.0, 1.0)


def interpolate_poses(times: np.ndarray, poses: np.ndarray, query: np.ndarray) -> np.ndarray:
    """Poses at the query times.

    Args:
        times: (T,) seconds, not decreasing.
        poses: (T, ..., 4, 4).
        query: (Q,) seconds; outside ``times`` the nearest end counts.
    Returns:
        (Q, ..., 4, 4) float64
    """
    before, fraction = bracket(times, np.asarray(query, np.float64))
    # At recorded times the recorded pose itself, to the bit; only the rest is interpolated.
    result = poses[before + (fraction == 1)].astype(np.float64)
    between = np.flatnonzero((fraction > 0) & (fraction < 1))
    if len(between):
        start = poses[before[between]].astype(np.float64)
        end = poses[before[between] + 1].astype(np.float64)
        part = fraction[between].reshape(-1, *[1] * (poses.ndim - 2))  # (q, ..., 1)
        turn = so3_log(start[..., :3, :3].swapaxes(-1, -2) @ end[..., :3, :3])
        result[between, ..., :3, :3] = start[..., :3, :3] @ so3_exp(part * turn)
        result[between, ..., :3, 3] = start[..., :3, 3] + part * (end[..., :3, 3] - start[..., :3, 3])
    return result


def interpolate_values(times: np.ndarray, values: np.ndarray, query: np.ndarray) -> np.ndarray:
    """Linear interpolation: (T,) times and (T, ...) values at (Q,) query times, clamped; (Q, ...) float64."""
    before, fraction = bracket(times, np.asarray(query, np.float64))
    after = np.minimum(before + 1, len(times) - 1)
    fraction = fraction.reshape(-1, *[1] * (values.ndim - 1))
    start = values[before].astype(np.float64)
    return start + fraction * (values[after].astype(np.float64) - start)


def nearest_index(times: np.ndarray, query: np.ndarray) -> np.ndarray:
    """Index (Q,) of the recorded time nearest to each query time; of two equally near, the earlier."""
    query = np.asarray(query, np.float64)
    if len(times) == 1:
        return np.zeros(len(query), np.int64)
    after = np.clip(np.searchsorted(times, query, side="left"), 1, len(times) - 1)
    return np.where(query - times[after - 1] <= times[after] - query, after - 1, after)
