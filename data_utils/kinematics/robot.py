"""A robot as recordings and controllers number its joints: which they are, in which units, and how it grips."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
from scipy.spatial.transform import Rotation

from data_utils.errors import DataError
from data_utils.kinematics.chain import Chain
from data_utils.kinematics.description import description_path, read_chain
from data_utils.yaml_file import Wrong, build, read_yaml

UNITS = ("rad", "deg", "lerobot")


@dataclass(frozen=True)
class RobotJoint:
    """A joint, and what its numbers mean: position = ``sign`` * number, in the robot's units, + ``offset``.

    ``offset`` is in degrees (radians where the units are rad; metres of a joint that slides), as is ``range``, of units
    lerobot alone: the joint's positions at -100 and 100, before sign and offset.
    """

    name: str
    sign: int = 1
    offset: float = 0.0
    range: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if self.sign not in (-1, 1):
            raise Wrong(f"sign is {self.sign}; wanted 1 or -1")
        if self.range is not None and (len(self.range) != 2 or self.range[0] == self.range[1]):
            raise Wrong(f"range is {list(self.range)}; wanted [at -100, at 100]")

    @classmethod
    def read(cls, raw: object) -> "RobotJoint":
        return cls(raw) if isinstance(raw, str) else build(cls, raw)


@dataclass(frozen=True)
class GripperColumn:
    """Which of the numbers is the gripper's, counted from 0, and its readings at both ends."""

    column: int
    closed: float
    open: float

    def __post_init__(self) -> None:
        if self.closed == self.open:
            raise Wrong(f"closed and open are both {self.open}")


@dataclass(frozen=True)
class RobotSettings:
    """What a robot file says.

    Args:
        description: MJCF or URDF beside the file, or a name of robot_descriptions.
        end_effector: site, body or link.
        joints: in the order of their numbers.
        units: of the numbers: ``rad``, ``deg``, or ``lerobot``, -100 to 100 of each joint's range; a joint that slides
            has metres in the first two.
        base: body in whose frame poses are; the description's world by default.
        tcp: x, y, z in metres and a rotation vector in radians, from ``end_effector`` to the point that is meant.
        gripper: where one of the numbers is the gripper's.
    """

    description: str
    end_effector: str
    joints: tuple[RobotJoint, ...]
    units: str
    base: str | None = None
    tcp: tuple[float, ...] | None = None
    gripper: GripperColumn | None = None

    def __post_init__(self) -> None:
        if not self.joints:
            raise Wrong("needs at least one joint", "joints")
        if self.units not in UNITS:
            raise Wrong(f"units is {self.units!r}; wanted {', '.join(UNITS)}")
        for joint in self.joints:
            if (joint.range is None) == (self.units == "lerobot"):
                what = (
                    "has no range, [at -100, at 100] in degrees, which"
                    if joint.range is None
                    else "has a range, which only"
                )
                raise Wrong(f"joint {joint.name!r} {what} units lerobot want", "joints")
        if self.tcp is not None and len(self.tcp) != 6:
            raise Wrong(f"tcp has {len(self.tcp)} numbers; wanted x, y, z and a rotation vector")
        if self.gripper is not None and not 0 <= self.gripper.column <= len(self.joints):
            raise Wrong(f"gripper.column is {self.gripper.column}; wanted 0 to {len(self.joints)}")


class Robot:
    """A robot's numbers and poses.

    Args:
        settings: what its file says.
        folder: that a description's path is relative to.
        name: of the file, for messages.
    Raises:
        DataError: the description cannot be used; one line that begins with ``name``.
    """

    def __init__(self, settings: RobotSettings, folder: Path, name: str = "robot") -> None:
        self.settings, self.name = settings, name
        joints = [joint.name for joint in settings.joints]
        try:
            self.description = description_path(settings.description, folder)
            self.chain: Chain = read_chain(self.description, joints, settings.end_effector, settings.base)
        except DataError as error:
            raise DataError(f"{name}: {error}", error.rule) from error
        if settings.tcp is not None:
            ee_from_tcp = np.eye(4)
            ee_from_tcp[:3, 3] = settings.tcp[:3]
            ee_from_tcp[:3, :3] = Rotation.from_rotvec(settings.tcp[3:]).as_matrix()
            self.chain = self.chain.extended(ee_from_tcp)

    @property
    def width(self) -> int:
        """How many numbers a row has: one per joint, and the gripper's where the file names it."""
        return len(self.chain) + (self.settings.gripper is not None)

    @cached_property
    def _joint_columns(self) -> list[int]:
        gripper = self.settings.gripper
        return [column for column in range(self.width) if gripper is None or column != gripper.column]

    def joint_numbers(self, numbers: np.ndarray) -> np.ndarray:
        """(T, n), without the gripper's, of rows (T, width)."""
        return numbers[:, self._joint_columns]

    def positions(self, numbers: np.ndarray) -> np.ndarray:
        """Of rows (T, width): positions (T, n) of the joints in radians and metres, as :class:`Chain` takes them."""
        scale, shift = self.scale_and_shift(self.settings.units)
        return self.joint_numbers(np.asarray(numbers, np.float64)) * scale + shift

    def numbers(self, positions: np.ndarray, openness: np.ndarray | None = None) -> np.ndarray:
        """Rows (T, width) of positions (T, n) and, for a robot whose file names a gripper, openness (T,) in [0, 1]."""
        scale, shift = self.scale_and_shift(self.settings.units)
        rows = np.empty((len(positions), self.width))
        rows[:, self._joint_columns] = (positions - shift) / scale
        if (gripper := self.settings.gripper) is not None:
            if openness is None:
                raise ValueError(f"{self.name} has a gripper among its numbers; openness is wanted")
            rows[:, gripper.column] = gripper.closed + np.asarray(openness) * (gripper.open - gripper.closed)
        return rows

    def poses(self, numbers: np.ndarray) -> np.ndarray:
        """base_from_ee, (T, 4, 4), of rows (T, width)."""
        return self.chain.poses(self.positions(numbers))

    def scale_and_shift(self, units: str) -> tuple[np.ndarray, np.ndarray]:
        """(n,) each: position = number * scale + shift, were the numbers in these units."""
        joints = self.settings.joints
        sign = np.array([joint.sign for joint in joints], np.float64)
        told = np.where(self.chain.slides | (self.settings.units == "rad"), 1.0, np.radians(1.0))  # of offset and range
        scale, shift = np.ones(len(joints)), np.zeros(len(joints))
        if units == "deg":
            scale = np.where(self.chain.slides, 1.0, np.radians(1.0))
        elif units == "lerobot":
            low, high = np.array([joint.range for joint in joints]).T * told
            scale, shift = (high - low) / 200, (high + low) / 2
        return sign * scale, sign * shift + told * np.array([joint.offset for joint in joints])


@dataclass(frozen=True)
class RobotSource:
    """A robot as a mapping names it: a file beside it, or what such a file says."""

    file: str | None = None
    settings: RobotSettings | None = None

    @classmethod
    def read(cls, raw: object) -> "RobotSource":
        return cls(file=raw) if isinstance(raw, str) else cls(settings=build(RobotSettings, raw))

    def open(self, mapping: Path) -> Robot:
        """The robot; made once for a file as it is. Raises ``DataError``: one line that names the file."""
        if self.settings is not None:
            return _inline(self.settings, mapping)
        path = mapping.parent / self.file
        return load_robot(path)

    def files(self, mapping: Path) -> list[Path]:
        """Those that poses depend on. Raises ``DataError``."""
        own = [] if self.file is None else [mapping.parent / self.file]
        return [*own, self.open(mapping).description]


def load_robot(path: Path) -> Robot:
    """The robot of a file (YAML, the fields of :class:`RobotSettings`); made once for a file as it is.

    Raises:
        DataError: one line that names the file, where it can the line, and what is wrong.
    """
    try:
        changed = path.stat().st_mtime_ns
    except OSError as error:
        raise DataError(f"{path}: no such robot file; name one relative to the mapping", "file") from error
    return _loaded(path, changed)


@lru_cache(maxsize=16)
def _loaded(path: Path, changed: int) -> Robot:
    try:
        settings = read_yaml(path).build(RobotSettings)
    except (OSError, ValueError) as error:
        raise DataError(str(error), "schema") from error
    return Robot(settings, path.parent, str(path))


@lru_cache(maxsize=16)
def _inline(settings: RobotSettings, mapping: Path) -> Robot:
    return Robot(settings, mapping.parent, f"{mapping}: robot")
