"""Numbers, poses and intrinsics of a mapping, taken from one episode of a recording."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import numpy as np
from scipy.spatial.transform import Rotation

from data_utils.convert.mapping import (
    INTRINSICS_FORMS,
    POSE_FORMS,
    Column,
    Gripper,
    InFile,
    InRig,
    Intrinsics,
    Pose,
    Values,
    calibration_file_name,
)
from data_utils.errors import DataError
from data_utils.geometry.motion import FASTEST_HAND, median_speed
from data_utils.geometry.pinhole import intrinsics_fault
from data_utils.h5io import VideoFrames
from data_utils.kinematics.recorded import Finding, far_commands, suspicions
from data_utils.kinematics.robot import GripperColumn, Robot
from data_utils.rig import Rig, RigCamera, read_rig
from data_utils.words import one_line
from data_utils.yaml_file import read_yaml

FAR_OUTSIDE = 0.25  # of a gripper's range
MOST_OUTSIDE = 0.1  # share of the readings
FULL_TURN = 2 * np.pi * 1.01


class Recording(Protocol):
    """One episode of a foreign format, as the mapping sees it."""

    place: str  # file and episode, for messages
    length: int  # T
    index: int  # of the episode
    columns: tuple[str, ...]  # every column there is
    video_root: str | None  # folder that VideoFrames are relative to
    fps: float | None  # frames per second, where the format states them

    def numbers(self, column: str) -> np.ndarray:
        """(T, n) float64. Raises DataError where the column holds no numbers."""

    def texts(self, column: str) -> list[str]:
        """T texts. Raises DataError where the column holds none."""

    def first(self, column: str) -> object:
        """The plain value of the first frame."""

    def frames(self, column: str, flip_rows: bool) -> Sequence[np.ndarray] | VideoFrames:
        """Frames as ``CameraData`` takes them."""

    def frame_size(self, column: str) -> tuple[int, int]:
        """Width and height of the frames."""

    def task(self) -> str:
        """The episode's instruction. Raises DataError where the format has none."""

    def of_episode(self, key: str) -> object:
        """A value of the format's table of episodes."""


class Evaluator:
    """Evaluates a mapping's numbers for one episode.

    Args:
        recording: the episode.
        calibration: folder of the files that the mapping names.
        mapping: the mapping file, for messages and for paths relative to it.
    """

    def __init__(self, recording: Recording, calibration: Path, mapping: Path) -> None:
        self._recording, self._calibration, self._mapping = recording, calibration, mapping
        self._contents: dict[Path, object] = {}
        self.remarks: list[str] = []  # "rule: what is unusual", for whoever inspects the episode

    def fault(self, what: str, rule: str) -> DataError:
        return DataError(f"{self._recording.place}: {what}", rule)

    def require(self, column: str, field: str) -> None:
        """Raises DataError, listing the columns there are, where ``column`` is not one of them."""
        if column not in self._recording.columns:
            what = f"no column {column!r}, which {self._mapping} wants for {field}"
            raise self.fault(f"{what}; there are {', '.join(self._recording.columns)}", "schema")

    def numbers(self, values: Values, field: str) -> np.ndarray:
        """(T, n) float64, or (1, n) where nothing differs by frame."""
        pieces = [self._piece(piece, field) for piece in values.pieces]
        rows = max(len(piece) for piece in pieces)
        return np.concatenate([np.broadcast_to(piece, (rows, piece.shape[1])) for piece in pieces], axis=1)

    def _piece(self, piece: Column | InFile | tuple[float, ...], field: str) -> np.ndarray:
        if isinstance(piece, Column):
            self.require(piece.name, field)
            numbers = self._recording.numbers(piece.name)
            if piece.stop is not None and piece.stop > numbers.shape[1]:
                raise self.fault(
                    f"{field}: column {piece.name!r} has {numbers.shape[1]} numbers, not {piece.stop}", "schema"
                )
            return numbers[:, piece.start : piece.stop]
        if isinstance(piece, InFile):
            return self._in_file(piece, field)
        return np.array([piece])

    def _in_file(self, piece: InFile, field: str) -> np.ndarray:
        path = self._path(piece, field)
        content = self._content(path)
        try:
            found = np.array(_walk(content, piece.key.split(".")), np.float64)
        except (LookupError, TypeError, ValueError) as error:
            raise DataError(
                f"{path}: has no numbers at {piece.key!r} ({error}), wanted for {field}", "schema"
            ) from error
        if "*" not in piece.key.split("."):
            return found.reshape(1, -1)
        if len(found) < self._recording.length:
            what = f"{piece.key!r} has {len(found)} entries for {self._recording.length} frames, wanted for {field}"
            raise DataError(f"{path}: {what}", "schema")
        return found[: self._recording.length].reshape(self._recording.length, -1)

    def _path(self, file: InFile | InRig, field: str) -> Path:
        try:
            return self._calibration / calibration_file_name(file, self._recording.index)
        except (KeyError, IndexError, ValueError) as error:
            what = f"{field}: file {file.file!r} cannot be filled in ({error}); wanted {{episode_index}} and the like"
            raise self.fault(what, "schema") from error

    def rig_camera(self, place: InRig, field: str) -> RigCamera:
        """Raises DataError where there is none."""
        path = self._path(place, field)
        try:
            changed = path.stat().st_mtime_ns
        except OSError as error:
            raise DataError(f"{path}: no such camera rig; {self._mapping} names it for {field}", "file") from error
        return _rig(path, changed).camera(place.camera)

    def _content(self, path: Path) -> object:
        if path not in self._contents:
            try:
                is_json = path.suffix == ".json"
                self._contents[path] = (
                    json.loads(path.read_text(encoding="utf-8")) if is_json else read_yaml(path).value
                )
            except FileNotFoundError as error:
                raise DataError(f"{path}: no such calibration file; {self._mapping} names it", "file") from error
            except (OSError, ValueError) as error:
                raise DataError(f"{path}: cannot be read ({one_line(error)})", "file") from error
        return self._contents[path]

    # -- what the numbers mean ------------------------------------------------------------------------------------

    def pose(self, pose: Pose, field: str) -> np.ndarray:
        """(T, 4, 4) float64, or (1, 4, 4) where it does not differ by frame."""
        numbers = self.numbers(pose.values, field)
        if not np.isfinite(numbers).all():
            frame = int(np.argmin(np.isfinite(numbers).all(axis=1)))
            raise self.fault(f"{field} at frame {frame} is not finite", "pose")
        if pose.form == "joints":
            matrices = self._robot(pose, numbers, field).poses(numbers)
            return _inverse(matrices) if pose.inverse else matrices
        wanted = POSE_FORMS[pose.form][0]
        if numbers.shape[1] != wanted:
            raise self.fault(f"{field} has {numbers.shape[1]} numbers; form {pose.form} takes {wanted}", "pose")
        if pose.form == "xyz+quat":
            norms = np.linalg.norm(numbers[:, 3:], axis=1)
            if not (norms > 1e-6).all():
                raise self.fault(f"{field} at frame {int(np.argmin(norms))} has a quaternion of length 0", "rotation")
        self._check_angles(pose, numbers, field)
        matrices = _matrices(pose, numbers)
        return _inverse(matrices) if pose.inverse else matrices

    def _check_angles(self, pose: Pose, numbers: np.ndarray, field: str) -> None:
        """Refuse angles that are certainly in degrees where radians are meant."""
        if pose.form == "xyz+rotvec":
            largest = np.linalg.norm(numbers[:, 3:], axis=1)
        elif pose.form == "xyz+euler" and pose.angles == "radians":
            largest = np.abs(numbers[:, 3:]).max(axis=1)
        else:
            return
        beyond = largest > FULL_TURN
        if beyond.mean() > MOST_OUTSIDE:
            what = f"{field} turns by up to {largest.max():.4g} radians, {beyond.mean():.0%} of it"
            raise self.fault(f"{what} by more than a full turn; are its angles in degrees?", "rotation")

    def _robot(self, pose: Pose, numbers: np.ndarray, field: str) -> Robot:
        """Whose joints ``numbers`` (T, width) are."""
        robot = pose.robot.open(self._mapping)
        if numbers.shape[1] != robot.width:
            joints = f"{len(robot.chain)} joints ({', '.join(robot.chain.names)})"
            gripper = (
                "" if robot.width == len(robot.chain) else f" and a gripper, number {robot.settings.gripper.column}"
            )
            what = f"{field} has {numbers.shape[1]} numbers; {robot.name} names {joints}{gripper}"
            raise self.fault(what, "pose")
        return robot

    def check_joints(self, pose: Pose, times: np.ndarray, field: str, desired: Pose | None = None) -> None:
        """Refuse joint positions at (T,) seconds that are not this robot's, and commands that are far from them."""
        numbers = self._joint_rows(pose, field)
        robot = self._robot(pose, numbers, field)
        self._judge(suspicions(robot, numbers, times), field)
        if desired is None or desired.form != "joints":
            return
        commands = self._joint_rows(desired, f"{field}.desired")
        commanded = self._robot(desired, commands, f"{field}.desired")
        self._judge(suspicions(commanded, commands, times), f"{field}.desired")
        if commanded.chain.names == robot.chain.names:
            self._judge(far_commands(robot, numbers, commands, commanded), f"{field}.desired")

    def _joint_rows(self, pose: Pose, field: str) -> np.ndarray:
        """(T, width)."""
        numbers = self.numbers(pose.values, field)
        return np.broadcast_to(numbers, (self._recording.length, numbers.shape[1]))

    def _judge(self, findings: Sequence[Finding], field: str) -> None:
        for finding in findings:
            if finding.refused:
                raise self.fault(f"{field}: {finding.what}", "pose")
            self.remarks.append(f"pose: {field}: {finding.what}")

    def check_speed(self, world_from_ee: np.ndarray, times: np.ndarray, field: str) -> None:
        """Refuse (T, 4, 4) that moves at (T,) seconds as no arm does."""
        speed = median_speed(world_from_ee, times)
        if speed > FASTEST_HAND:
            what = f"{field} moves at {speed:.4g} m/s in the median"
            raise self.fault(f"{what}; are its positions in millimetres, or its times in another unit?", "pose")

    def openness(self, gripper: Gripper, field: str) -> np.ndarray:
        """(T,) float64 in [0, 1]."""
        reading = self.numbers(gripper.values, field)
        if reading.shape[1] != 1:
            raise self.fault(f"{field} has {reading.shape[1]} numbers; a gripper's reading is one", "gripper")
        return self._openness(reading, gripper, field)

    def openness_among_joints(self, pose: Pose, field: str) -> np.ndarray | None:
        """(T,) float64 in [0, 1] of a gripper whose readings are among those of a pose's joints; None without one."""
        if pose.robot is None or (gripper := pose.robot.open(self._mapping).settings.gripper) is None:
            return None
        numbers = self.numbers(pose.values, field)
        self._robot(pose, numbers, field)
        return self._openness(numbers[:, [gripper.column]], gripper, field)

    def _openness(self, reading: np.ndarray, gripper: Gripper | GripperColumn, field: str) -> np.ndarray:
        if not np.isfinite(reading).all():
            raise self.fault(f"{field} at frame {int(np.argmin(np.isfinite(reading[:, 0])))} is not finite", "gripper")
        openness = (reading[:, 0] - gripper.closed) / (gripper.open - gripper.closed)
        self._check_range(openness, reading[:, 0], gripper, field)
        return np.broadcast_to(openness.clip(0, 1), (self._recording.length,))

    def _check_range(
        self, openness: np.ndarray, reading: np.ndarray, gripper: Gripper | GripperColumn, field: str
    ) -> None:
        """Readings that no gripper of this range gives: a few are remarked on, many refused."""
        far = (openness < -FAR_OUTSIDE) | (openness > 1 + FAR_OUTSIDE)
        if not far.any():
            return
        lowest, highest = float(reading.min()), float(reading.max())
        what = (
            f"{field} reads {lowest:g} to {highest:g}, {far.mean():.0%} of it far outside {gripper.closed:g} (closed)"
        )
        what = f"{what} to {gripper.open:g} (open)"
        if far.mean() > MOST_OUTSIDE:
            raise self.fault(f"{what}; is it in another unit? Give closed and open as the column has them", "gripper")
        self.remarks.append(f"gripper: {what}; it was cut off there")

    def intrinsics(self, K: Intrinsics, frames: str, field: str) -> np.ndarray:
        """(3, 3) or (T, 3, 3) float64, at the size of the frames in column ``frames``."""
        numbers = self.numbers(K.values, field)
        wanted = INTRINSICS_FORMS[K.form]
        if numbers.shape[1] != wanted:
            raise self.fault(f"{field} has {numbers.shape[1]} numbers; form {K.form} takes {wanted}", "intrinsics")
        matrices = np.zeros((len(numbers), 3, 3))
        matrices[:, 2, 2] = 1
        if K.form == "matrix":
            matrices[:] = numbers.reshape(-1, 3, 3)
        elif K.form == "fovy":  # of a simulator: square pixels, centred
            width, height = K.size if K.size is not None else self._recording.frame_size(frames)
            focal = 0.5 * height / np.tan(np.radians(numbers[:, 0]) / 2)
            matrices[:, 0, 0] = matrices[:, 1, 1] = focal
            matrices[:, 0, 2], matrices[:, 1, 2] = width / 2, height / 2
        else:
            places = {"fx": (0, 0), "fy": (1, 1), "cx": (0, 2), "cy": (1, 2)}
            for number, name in zip(numbers.T, K.form.split("+"), strict=True):
                matrices[(slice(None), *places[name])] = number
        if K.size is not None:
            width, height = self._recording.frame_size(frames)
            matrices[:, 0] *= width / K.size[0]
            matrices[:, 1] *= height / K.size[1]
        width, height = self._recording.frame_size(frames)
        fault = intrinsics_fault(matrices, (height, width))
        if fault is not None:
            raise self.fault(f"{field} at frame {fault[0]} {fault[1]}", "intrinsics")
        return matrices[0] if len(matrices) == 1 else matrices


@lru_cache(maxsize=16)
def _rig(path: Path, mtime_ns: int) -> Rig:
    """``mtime_ns``: of the file, so that one that is written anew is read anew. (A service asks for every frame.)"""
    return read_rig(path)


def _matrices(pose: Pose, numbers: np.ndarray) -> np.ndarray:
    """(N, n) numbers to (N, 4, 4)."""
    if pose.form == "matrix":
        return numbers.reshape(-1, 4, 4)
    matrices = np.tile(np.eye(4), (len(numbers), 1, 1))
    matrices[:, :3, 3] = numbers[:, :3]
    rest = numbers[:, 3:]
    if pose.form == "xyz+matrix":
        matrices[:, :3, :3] = rest.reshape(-1, 3, 3)
    elif pose.form == "xyz+quat":
        matrices[:, :3, :3] = Rotation.from_quat(rest[:, [1, 2, 3, 0]] if pose.order == "wxyz" else rest).as_matrix()
    elif pose.form == "xyz+rotvec":
        matrices[:, :3, :3] = Rotation.from_rotvec(rest).as_matrix()
    else:
        rotation = Rotation.from_euler(pose.axes, rest, degrees=pose.angles == "degrees")
        matrices[:, :3, :3] = rotation.as_matrix()
    return matrices


def _inverse(matrices: np.ndarray) -> np.ndarray:
    """Of rigid transforms (N, 4, 4)."""
    inverse = np.tile(np.eye(4), (len(matrices), 1, 1))
    inverse[:, :3, :3] = matrices[:, :3, :3].transpose(0, 2, 1)
    inverse[:, :3, 3] = -(inverse[:, :3, :3] @ matrices[:, :3, 3, None])[..., 0]
    return inverse


def _walk(content: object, keys: Sequence[str]) -> object:
    """The part of nested lists and dictionaries that ``keys`` leads to; "*" is every entry of a list."""
    if not keys:
        return content
    key, rest = keys[0], keys[1:]
    if key == "*":
        return [_walk(item, rest) for item in content]
    return _walk(content[int(key)] if isinstance(content, list) else content[key], rest)
