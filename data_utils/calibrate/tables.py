"""Small tables that people write, CSV, YAML or JSON: a robot's poses by picture, and pixels of the gripper by frame."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.spatial.transform import Rotation

from data_utils.episodes.schema import pose_fault
from data_utils.errors import DataError
from data_utils.geometry.motion import FAR
from data_utils.yaml_file import Wrong, YamlFile, build, read_yaml

POSE_COLUMNS = ("picture", "x", "y", "z", "qx", "qy", "qz", "qw")
MARK_COLUMNS = ("episode", "frame", "u", "v")
_POSE = "position with quaternion_xyzw (or quaternion_wxyz), or a 4x4 matrix"


@dataclass(frozen=True)
class Mark:
    """Where a frame of an episode shows the gripper's point; ``episode`` is its file's name, without folders."""

    episode: str
    frame: int
    u: float
    v: float

    def __str__(self) -> str:
        return f"{self.episode} frame {self.frame}"


@dataclass(frozen=True)
class _Pose:
    position: tuple[float, float, float] | None = None
    quaternion_xyzw: tuple[float, float, float, float] | None = None
    quaternion_wxyz: tuple[float, float, float, float] | None = None
    matrix: tuple[tuple[float, ...], ...] | None = None

    def pose(self) -> np.ndarray:
        """(4, 4). Raises ``ValueError``."""
        quaternions = [item for item in (self.quaternion_xyzw, self.quaternion_wxyz) if item is not None]
        if self.matrix is not None and self.position is None and not quaternions:
            return _checked(np.array(self.matrix))
        if self.matrix is not None or self.position is None or len(quaternions) != 1:
            raise ValueError(f"wanted {_POSE}")
        pose, wxyz = np.eye(4), self.quaternion_wxyz
        pose[:3, :3] = _rotation(self.quaternion_xyzw if wxyz is None else (*wxyz[1:], wxyz[0]))
        pose[:3, 3] = self.position
        return _checked(pose)


def read_poses(path: Path) -> dict[str, np.ndarray]:
    """``world_from_ee`` (4, 4) by the name of a picture.

    A CSV has the columns of :data:`POSE_COLUMNS` (metres); YAML and JSON have, by the picture's name, a position and a
    quaternion, or a 4x4 matrix.

    Raises:
        DataError: no such file, or what is wrong in it, with its line.
    """
    poses: dict[str, np.ndarray] = {}
    if path.suffix == ".csv":
        for line, row in _rows(path, POSE_COLUMNS):
            try:
                x, y, z, *quaternion = (float(row[name]) for name in POSE_COLUMNS[1:])
                pose = _Pose((x, y, z), tuple(quaternion)).pose()
                if row["picture"] in poses:
                    raise ValueError(f"{row['picture']} is there twice")
            except ValueError as error:
                raise DataError(f"{path}, line {line}: {error}", "pose") from error
            poses[row["picture"]] = pose
        return poses
    file = _read(path)
    if not isinstance(file.value, dict):
        raise DataError(f"{path}: wanted, by the name of each picture, {_POSE}", "schema")
    for name, raw in file.value.items():
        try:
            entry = {"matrix": raw} if isinstance(raw, list) else raw
            poses[str(name)] = build(_Pose, entry).pose()
        except ValueError as error:
            raise DataError(f"{file.at(str(name))}: {name}: {error}", "pose") from error
    return poses


def read_marks(path: Path) -> list[Mark]:
    """A CSV has the columns of :data:`MARK_COLUMNS`, YAML and JSON a list of entries with these.

    Without u and v, a frame does not show the point and is left out.

    Raises:
        DataError: no such file, or what is wrong in it, with its line.
    """
    if path.suffix == ".csv":
        entries = [(f"{path}, line {line}", row) for line, row in _rows(path, MARK_COLUMNS)]
    else:
        file = _read(path)
        if not isinstance(file.value, list) or not all(isinstance(item, dict) for item in file.value):
            raise DataError(f"{path}: wanted a list of entries with {', '.join(MARK_COLUMNS)}", "schema")
        entries = [(file.at(f"[{index}]"), row) for index, row in enumerate(file.value)]
    marks = []
    for place, row in entries:
        if row.get("u") in (None, "") and row.get("v") in (None, ""):
            continue
        try:
            mark = Mark(Path(str(row["episode"])).name, int(row["frame"]), float(row["u"]), float(row["v"]))
            if not np.isfinite([mark.u, mark.v]).all():
                raise ValueError("u and v are not finite")
        except (KeyError, TypeError, ValueError) as error:
            what = f"lacks {error}" if isinstance(error, KeyError) else str(error)
            raise DataError(f"{place}: {what}; wanted {', '.join(MARK_COLUMNS)}", "schema") from error
        marks.append(mark)
    return marks


def _rows(path: Path, columns: tuple[str, ...]) -> list[tuple[int, dict[str, str]]]:
    """Rows of a CSV with their lines."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, skipinitialspace=True)
            there = [name.strip() for name in reader.fieldnames or ()]
            if missing := [name for name in columns if name not in there]:
                what = f"has no column {missing[0]!r}; wanted the first line {','.join(columns)}"
                raise DataError(f"{path}: {what}", "schema")
            reader.fieldnames = there
            rows = []
            for row in reader:
                if None in row or None in row.values():
                    what = f"has not {len(there)} values, as the first line has"
                    raise DataError(f"{path}, line {reader.line_num}: {what}", "schema")
                rows.append((reader.line_num, {name: value.strip() for name, value in row.items()}))
            return rows
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read ({error}); wanted {','.join(columns)}", "file") from error


def _read(path: Path) -> YamlFile:
    """JSON is YAML."""
    try:
        return read_yaml(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})", "file") from error
    except ValueError as error:
        raise DataError(str(error), "schema") from error


def _rotation(quaternion: tuple[float, ...]) -> np.ndarray:
    length = float(np.linalg.norm(quaternion))
    if not 0.9 < length < 1.1:
        raise ValueError(f"the quaternion has length {length:.3g}; wanted 1")
    return Rotation.from_quat(quaternion).as_matrix()


def _checked(pose: np.ndarray) -> np.ndarray:
    if pose.shape != (4, 4):
        raise Wrong(f"the matrix has shape {pose.shape}; wanted 4 rows of 4")
    if (fault := pose_fault(pose[None])) is not None:
        raise Wrong(f"the pose {fault[2]}")
    if np.abs(pose[:3, 3]).max() > FAR:
        raise Wrong(f"the position is {pose[:3, 3].round(1).tolist()} metres; is it in millimetres?")
    return pose
