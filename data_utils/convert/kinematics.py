"""Forward kinematics of a serial chain of a URDF, for recordings that hold joint positions only."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from scipy.spatial.transform import Rotation

from data_utils.errors import DataError
from data_utils.words import one_line


class Chain:
    """The joints between two links of a robot.

    Args:
        urdf: the robot's description; meshes are not loaded.
        base: link in which poses are given.
        tip: link whose pose is wanted.
        joints: names of the recorded joints, in the order of the recorded numbers.
    Raises:
        DataError: yourdfpy is not installed, the file cannot be read, the links are not connected, or a joint that
            moves between them is not recorded.
    """

    def __init__(self, urdf: Path, base: str, tip: str, joints: Sequence[str]) -> None:
        self._joints, self._recorded = _between(urdf, base, tip), list(joints)
        moving = [joint.name for joint in self._joints if joint.type != "fixed"]
        missing = [name for name in moving if name not in self._recorded]
        if missing:
            what = f"joint {missing[0]!r} moves between {base} and {tip} and is not recorded; it has {moving}"
            raise DataError(f"{urdf}: {what}", "schema")

    def poses(self, positions: np.ndarray) -> np.ndarray:
        """base_from_tip, (T, 4, 4), of positions (T, n) in radians and metres."""
        poses = np.tile(np.eye(4), (len(positions), 1, 1))
        for joint in self._joints:
            if joint.origin is not None:
                poses = poses @ joint.origin
            if joint.type == "fixed":
                continue
            moved = np.tile(np.eye(4), (len(positions), 1, 1))
            axis = np.asarray(joint.axis, np.float64)
            along = positions[:, self._recorded.index(joint.name), None] * axis  # (T, 3)
            if joint.type == "prismatic":
                moved[:, :3, 3] = along
            else:
                moved[:, :3, :3] = Rotation.from_rotvec(along).as_matrix()
            poses = poses @ moved
        return poses


def _between(urdf: Path, base: str, tip: str) -> list:
    """The joints on the way from link ``base`` to link ``tip``."""
    try:
        import yourdfpy
    except ImportError as error:
        raise DataError(f"{urdf}: forward kinematics need yourdfpy; pip install yourdfpy", "file") from error
    if not urdf.is_file():
        raise DataError(f"{urdf}: no such URDF; the mapping names it relative to itself", "file")
    try:
        robot = yourdfpy.URDF.load(str(urdf), build_scene_graph=False, load_meshes=False).robot
    except Exception as error:  # its parser raises whatever the XML library does
        raise DataError(f"{urdf}: cannot be read as URDF ({one_line(error)})", "file") from error
    parents = {joint.child: joint for joint in robot.joints}
    chain, link = [], tip
    while link != base:
        if link not in parents:
            links = ", ".join(item.name for item in robot.links)
            raise DataError(f"{urdf}: no way from link {base!r} to {tip!r}; the links are {links}", "schema")
        joint = parents[link]
        if joint.type not in ("fixed", "revolute", "continuous", "prismatic") or joint.mimic is not None:
            raise DataError(f"{urdf}: joint {joint.name!r} is {joint.type}; chains of simple joints only", "schema")
        chain.append(joint)
        link = joint.parent
    return chain[::-1]
