"""The joints between a robot's base and its hand: poses of whole columns of positions, and the Jacobian of one row.

A chain is a product of exponentials (Brockett 1984; Lynch and Park, Modern Robotics, chapter 4), written down joint by
joint: a constant transform brings the frame before into one whose z is the joint's axis, and the joint turns about that
z, or slides along it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

BLOCK = 2048  # rows at a time: what they need stays in the cache


@dataclass(frozen=True)
class Joint:
    """One that moves.

    Args:
        name: its name.
        slides: along its axis; otherwise it turns about it.
        lower, upper: its limits, radians or metres; infinite where it has none.
        before_from_joint: (4, 4) from the frame of the joint before (of the first: the base) to this one's at position
            0, whose z is its axis.
    """

    name: str
    slides: bool
    lower: float
    upper: float
    before_from_joint: np.ndarray


class Chain:
    """Joints in series.

    Args:
        joints: from the base outwards; at least one.
        last_from_ee: (4, 4) from the last joint's frame to the end-effector.
        order: names of the joints in the order of positions; by default as they are in series.
    """

    def __init__(self, joints: Sequence[Joint], last_from_ee: np.ndarray, order: Sequence[str] | None = None) -> None:
        self._joints = tuple(joints)
        series = [joint.name for joint in joints]
        self.names = tuple(series if order is None else order)
        self._to_series = np.array([self.names.index(name) for name in series])
        self._to_order = np.argsort(self._to_series)
        self._before_from_joint = np.stack([joint.before_from_joint for joint in joints])
        self._last_from_ee = np.asarray(last_from_ee, np.float64)
        self._slides_in_series = np.array([joint.slides for joint in joints])
        self._any_slides = bool(self._slides_in_series.any())
        self.slides = self._slides_in_series[self._to_order]  # (n,) bool, as all that follows in the order of positions
        self.lower = np.array([joint.lower for joint in joints])[self._to_order]
        self.upper = np.array([joint.upper for joint in joints])[self._to_order]

    def __len__(self) -> int:
        return len(self.names)

    def extended(self, ee_from_tcp: np.ndarray) -> "Chain":
        """The same joints with another end-effector, (4, 4) from this one's."""
        return Chain(self._joints, self._last_from_ee @ ee_from_tcp, self.names)

    def poses(self, positions: np.ndarray) -> np.ndarray:
        """base_from_ee, (T, 4, 4) float64, of positions (T, n) in radians and metres."""
        positions = np.asarray(positions, np.float64)
        poses = np.zeros((len(positions), 4, 4))
        poses[:, 3, 3] = 1
        for first in range(0, len(positions), BLOCK):
            block = np.ascontiguousarray(positions[first : first + BLOCK, self._to_series].T)  # (n, B)
            axes, origin = self._carried(block)
            poses[first : first + BLOCK, :3, :3] = axes.transpose(2, 1, 0)
            poses[first : first + BLOCK, :3, 3] = origin.T
        return poses

    def _carried(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of positions (n, B) in series: the end-effector's axes (axis, component, B), and its origin (3, B).

        Rows lie last, so that a constant transform is one product of matrices for all of them, and a turn about z mixes
        two rows of numbers.
        """
        count = positions.shape[1]
        axes = np.repeat(np.eye(3).reshape(9, 1), count, axis=1).reshape(3, 3 * count)
        origin = np.zeros(3 * count)
        sines, cosines = np.sin(positions), np.cos(positions)
        for number, constant in enumerate(self._before_from_joint):
            moved = constant[:3].T @ axes  # the new axes, and how far the origin moves
            origin += moved[3]
            if self._slides_in_series[number]:
                axes = moved[:3]
                origin += (axes[2].reshape(3, count) * positions[number]).ravel()
                continue
            x, y = moved[0].reshape(3, count), moved[1].reshape(3, count)
            turned = np.empty((3, 3, count))
            turned[0] = cosines[number] * x + sines[number] * y
            turned[1] = cosines[number] * y - sines[number] * x
            turned[2] = moved[2].reshape(3, count)
            axes = turned.reshape(3, 3 * count)
        moved = self._last_from_ee[:3].T @ axes
        return moved[:3].reshape(3, 3, count), (origin + moved[3]).reshape(3, count)

    def pose_and_jacobian(self, position: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """base_from_ee (4, 4) at a position (n,), and the Jacobian (6, n) there.

        The Jacobian's rows are the velocity of the end-effector's origin and its angular velocity, both in the base's
        axes: of one that turns, axis x (origin of ee - origin of joint) and axis; of one that slides, axis and 0.
        """
        position = position[self._to_series]
        if self._any_slides:
            turn, slide = np.where(self._slides_in_series, 0.0, position), np.where(self._slides_in_series, position, 0)
        else:
            turn, slide = position, None
        moving = self._before_from_joint.copy()
        sines, cosines = np.sin(turn)[:, None], np.cos(turn)[:, None]
        x, y = self._before_from_joint[:, :, 0], self._before_from_joint[:, :, 1]
        moving[:, :, 0] = cosines * x + sines * y
        moving[:, :, 1] = cosines * y - sines * x
        if slide is not None:
            moving[:, :, 3] += slide[:, None] * moving[:, :, 2]
        frames = np.empty_like(moving)
        frame = frames[0] = moving[0]
        for number in range(1, len(moving)):
            frame = np.dot(frame, moving[number], out=frames[number])
        base_from_ee = frame @ self._last_from_ee
        jacobian = np.empty((6, len(moving)))
        ax, ay, az = axes = frames[:, :3, 2].T
        rx, ry, rz = base_from_ee[:3, 3, None] - frames[:, :3, 3].T
        jacobian[0] = ay * rz - az * ry
        jacobian[1] = az * rx - ax * rz
        jacobian[2] = ax * ry - ay * rx
        jacobian[3:] = axes
        if slide is not None:
            jacobian[:3, self._slides_in_series] = axes[:, self._slides_in_series]
            jacobian[3:, self._slides_in_series] = 0
        return base_from_ee, jacobian[:, self._to_order]
