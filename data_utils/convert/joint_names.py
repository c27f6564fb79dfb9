"""Does a dataset call its numbers by the names of a robot's joints, in another order than the robot file does?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from data_utils.convert.mapping import Column, MappingError, Pose
from data_utils.convert.mapping import Mapping as ColumnMapping


def check_joint_names(mapping: ColumnMapping, path: Path, features: Mapping[str, dict]) -> None:
    """Raises MappingError where a column's names, as ``info.json`` has them, are a robot's joints in another order.

    Args:
        mapping: read from ``path``.
        features: of LeRobot's ``info.json``, by column.
    """
    for where, pose in _joint_poses(mapping):
        robot, pieces = pose.robot.open(path), pose.values.pieces
        if len(pieces) != 1 or not isinstance(pieces[0], Column):
            continue
        column = pieces[0]
        named = [_plain(name) for name in _names(features.get(column.name, {}).get("names"))][
            column.start : column.stop
        ]
        gripper = robot.settings.gripper
        of_joints = [name for number, name in enumerate(named) if gripper is None or number != gripper.column]
        wanted = [_plain(name) for name in robot.chain.names]
        if sorted(of_joints) == sorted(wanted) and of_joints != wanted:
            number = next(n for n, (found, name) in enumerate(zip(of_joints, wanted, strict=True)) if found != name)
            what = (
                f"{where}: joint {number} of column {column.name!r} is {of_joints[number]!r}, as the dataset says, and"
            )
            raise MappingError(
                f"{path}: {what} {wanted[number]!r} in {robot.name}; put joints in the column's order", "schema"
            )


def _joint_poses(mapping: ColumnMapping) -> Iterator[tuple[str, Pose]]:
    for number, arm in enumerate(mapping.arms):
        for where, source in ((f"arms[{number}].pose", arm), (f"arms[{number}].desired.pose", arm.desired)):
            if source is not None and source.pose.robot is not None:
                yield where, source.pose


def _names(raw: object) -> list[str]:
    """Of a feature: a list, or as older datasets have it a list in a mapping such as ``{motors: [...]}``."""
    if isinstance(raw, dict):
        raw = next(iter(raw.values()), None)
    return [name for name in raw if isinstance(name, str)] if isinstance(raw, list) else []


def _plain(name: str) -> str:
    """``shoulder_pan`` of ``shoulder_pan.pos`` and ``main_shoulder_pan``, LeRobot's names of a motor."""
    return name.lower().removesuffix(".pos").removeprefix("main_")
