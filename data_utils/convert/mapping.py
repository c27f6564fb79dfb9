"""Mapping files: which columns of a recording are poses, grippers, cameras and prompts (YAML, see docs/convert.md).

Everything that a mapping says is checked when it is read; which columns there are is checked against the recording.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from data_utils.convert.pairing import Pairing
from data_utils.errors import DataError
from data_utils.kinematics.robot import RobotSource
from data_utils.rig import read_rig
from data_utils.yaml_file import Wrong, build, field_names, read_yaml

PRESETS = Path(__file__).parent / "presets"

# Form of a pose -> (how many numbers, the fields that only this form has).
POSE_FORMS = {
    "xyz+quat": (7, {"order"}),
    "xyz+euler": (6, {"axes", "angles"}),
    "xyz+rotvec": (6, set()),
    "xyz+matrix": (12, set()),
    "matrix": (16, set()),
    "joints": (None, {"robot"}),
}
INTRINSICS_FORMS = {"matrix": 9, "fx+fy+cx+cy": 4, "fx+cx+fy+cy": 4, "fovy": 1}
_COLUMN = re.compile(r"(?P<name>.+?)\[(?P<start>\d+)(?::(?P<stop>\d+))?\]")


class MappingError(DataError):
    """A mapping file that cannot be used; one line that names the file and the field."""


@dataclass(frozen=True)
class Column:
    """Numbers ``start`` to ``stop`` of a column; all of them where ``stop`` is None."""

    name: str
    start: int = 0
    stop: int | None = None


@dataclass(frozen=True)
class InFile:
    """Numbers of a JSON or YAML file beside the recording.

    ``file`` is a path relative to the calibration folder, in which ``{episode_index}`` and ``{episode_chunk}`` are
    replaced; ``key`` walks into the content with dots, ``*`` standing for one entry per frame.
    """

    file: str
    key: str


@dataclass(frozen=True)
class InRig:
    """A camera of a rig (``data_utils.rig``), a file that lies as those of :class:`InFile` do."""

    file: str
    camera: str


@dataclass(frozen=True)
class Values:
    """Numbers joined from columns, files and constants, in this order; per frame, or once for the episode."""

    pieces: tuple[Column | InFile | tuple[float, ...], ...]

    @classmethod
    def read(cls, raw: object) -> "Values":
        pieces: list[Column | InFile | tuple[float, ...]] = []
        for item in raw if isinstance(raw, list) and not _is_numbers(raw) else [raw]:
            if isinstance(item, str):
                pieces.append(_column(item))
            elif isinstance(item, dict):
                pieces.append(build(InFile, item))
            elif _is_numbers(item):
                pieces.append(tuple(_flat(item)))
            else:
                raise Wrong(f"is {raw!r}; wanted a column, numbers, {{file, key}}, or a list of these")
        return cls(tuple(pieces))


@dataclass(frozen=True)
class Pose:
    """A rigid transform per frame, or one for the episode."""

    values: Values
    form: str
    order: str | None = None
    axes: str | None = None
    angles: str | None = None
    robot: RobotSource | None = None
    inverse: bool = False

    def __post_init__(self) -> None:
        if self.form not in POSE_FORMS:
            raise Wrong(f"form is {self.form!r}; wanted one of {', '.join(POSE_FORMS)}")
        wanted = POSE_FORMS[self.form][1]
        special = set().union(*(fields for _, fields in POSE_FORMS.values()))
        given = {name for name in special if getattr(self, name) is not None}
        if given != wanted:
            named = ", ".join(sorted(wanted)) or "none of these"
            raise Wrong(f"form {self.form} takes {named}, not {', '.join(sorted(given)) or 'nothing'}")
        if self.order not in (None, "xyzw", "wxyz"):
            raise Wrong(f"order is {self.order!r}; wanted xyzw or wxyz")
        if self.axes is not None and not re.fullmatch("[xyz]{3}|[XYZ]{3}", self.axes):
            raise Wrong(f"axes is {self.axes!r}; wanted three of xyz (about fixed axes) or of XYZ (moving axes)")
        if self.angles not in (None, "degrees", "radians"):
            raise Wrong(f"angles is {self.angles!r}; wanted degrees or radians")


@dataclass(frozen=True)
class Gripper:
    """A gripper's reading at its two ends; what lies between becomes openness 0 to 1."""

    values: Values
    closed: float
    open: float

    def __post_init__(self) -> None:
        if self.closed == self.open:
            raise Wrong(f"closed and open are both {self.open}")


@dataclass(frozen=True)
class Desired:
    """What an arm was told at each step."""

    pose: Pose
    gripper: Gripper | None = None


@dataclass(frozen=True)
class Arm:
    """An end-effector: world_from_ee = world_from_base @ pose @ tip_from_ee."""

    pose: Pose
    name: str = ""
    gripper: Gripper | None = None
    desired: Desired | None = None
    world_from_base: Pose | None = None
    tip_from_ee: Pose | None = None


@dataclass(frozen=True)
class Intrinsics:
    """Pinhole intrinsics; ``size`` is the (width, height) they were measured at, where frames have another one."""

    values: Values
    form: str
    size: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.form not in INTRINSICS_FORMS:
            raise Wrong(f"form is {self.form!r}; wanted one of {', '.join(INTRINSICS_FORMS)}")
        if self.size is not None and len(self.size) != 2:
            raise Wrong(f"size is {list(self.size)}; wanted [width, height]")


@dataclass(frozen=True)
class Camera:
    """Frames and calibration of a camera.

    It stands in the world (``world_from_cam``, fixed or per frame), or is carried by ``on_arm``, at ``ee_from_cam`` or
    where ``world_from_cam_at_first_frame`` says. Or a ``rig`` says all of that, and how its lens distorts.
    """

    frames: str
    K: Intrinsics | None = None
    axes: str | None = None
    rig: InRig | None = None
    world_from_cam: Pose | None = None
    on_arm: str | None = None
    ee_from_cam: Pose | None = None
    world_from_cam_at_first_frame: Pose | None = None
    world_from_base: Pose | None = None
    flip_rows: bool = False

    def __post_init__(self) -> None:
        if self.rig is not None:
            said = ("K", "axes", "world_from_cam", "on_arm", "ee_from_cam", "world_from_cam_at_first_frame")
            if given := [name for name in said if getattr(self, name) is not None]:
                raise Wrong(f"has a rig and {given[0]}; the rig says it, leave {given[0]} out")
            return
        for name in ("K", "axes"):
            if getattr(self, name) is None:
                raise Wrong(f"lacks field {name!r}; wanted it, or a rig")
        if self.axes not in ("opencv", "opengl"):
            raise Wrong(f"axes is {self.axes!r}; wanted opencv (z looks forward) or opengl (z looks back)")
        carried = (self.ee_from_cam, self.world_from_cam_at_first_frame)
        ways = sum(pose is not None for pose in (self.world_from_cam, *carried))
        if ways != 1 or (self.on_arm is not None) != (self.world_from_cam is None):
            what = "world_from_cam, or on_arm with either ee_from_cam or world_from_cam_at_first_frame"
            raise Wrong(f"needs {what}")


@dataclass(frozen=True)
class Keep:
    """Only episodes whose first frame has (or has not) these values in this column are converted."""

    column: str
    equals: object = None
    not_equals: object = None

    def __post_init__(self) -> None:
        if (self.equals is None) == (self.not_equals is None):
            raise Wrong("needs either equals or not_equals")


@dataclass(frozen=True)
class Prompt:
    """One source of instructions: LeRobot's ``task``, a text ``column``, a key of the episodes' table, or a text."""

    task: bool = False
    column: str | None = None
    episode: str | None = None
    text: str | None = None

    def __post_init__(self) -> None:
        if self.task + sum(item is not None for item in (self.column, self.episode, self.text)) != 1:
            raise Wrong("needs one of task: true, column, episode, text")


@dataclass(frozen=True)
class Mapping:
    """What a recording's columns mean; of a faster recording only ``rate`` frames a second are kept."""

    arms: tuple[Arm, ...]
    cameras: dict[str, Camera]
    prompts: tuple[Prompt, ...]
    timestamp: str | None = None
    time_step: float | None = None
    rate: float | None = None
    subtasks: str | None = None
    pairing: Pairing = Pairing()
    ee_indices: tuple[int, ...] | None = None
    keep: tuple[Keep, ...] = ()

    def __post_init__(self) -> None:
        if not self.arms or not self.cameras or not self.prompts:
            raise Wrong("needs at least one of each: arms, cameras, prompts")
        if (self.timestamp is None) == (self.time_step is None):
            raise Wrong("needs either timestamp (a column) or time_step (seconds)")
        for name in ("time_step", "rate"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise Wrong(f"{name} is {getattr(self, name)}; wanted more than 0")
        names = [arm.name for arm in self.arms]
        for name, camera in self.cameras.items():
            if camera.on_arm is not None and names.count(camera.on_arm) != 1:
                raise Wrong(f"cameras.{name}.on_arm is {camera.on_arm!r}; the arms are {names}")
        if len({arm.desired is None for arm in self.arms}) > 1:
            raise Wrong("desired must be given for all arms or for none")


# Fields that are the name of a column as a whole.
_COLUMN_FIELDS = {
    (Camera, "frames"),
    (Keep, "column"),
    (Prompt, "column"),
    (Mapping, "timestamp"),
    (Mapping, "subtasks"),
}


def load_mapping(name: str | Path) -> tuple[Mapping, Path]:
    """Read a mapping file.

    Args:
        name: path of a YAML file, or the name of a preset (a file of ``data_utils/convert/presets`` without suffix).
    Returns:
        the mapping, and the file it was read from.
    Raises:
        MappingError: no such file or preset, or what is wrong with it.
    """
    path = Path(name)
    if not path.is_file():
        path = PRESETS / f"{name}.yaml"
        if not path.is_file():
            presets = ", ".join(sorted(item.stem for item in PRESETS.glob("*.yaml")))
            raise MappingError(f"{name}: neither a mapping file nor a preset; presets: {presets}", "location")
    try:
        return read_yaml(path).build(Mapping), path
    except ValueError as error:
        raise MappingError(str(error), "schema") from error


def check_columns(mapping: Mapping, path: Path, columns: Iterable[str]) -> None:
    """Raises MappingError for the first column of a mapping (read from ``path``) that is not among ``columns``."""
    there = list(columns)
    for field, column in _named(mapping, ""):
        if isinstance(column, str) and column not in there:
            what = f"{field} wants column {column!r}, which the recording has not; it has {', '.join(there)}"
            raise MappingError(f"{path}: {what}", "schema")


def check_files(mapping: Mapping, path: Path, calibration: Path) -> None:
    """Raises MappingError for the first file, the same for all episodes, that is not in the folder ``calibration``, or
    that is a rig without the camera that is wanted of it."""
    for field, file in _named(mapping, ""):
        if not isinstance(file, InFile | InRig) or "{" in file.file:
            continue
        if not (calibration / file.file).is_file():
            what = f"{field} wants the calibration file {calibration / file.file}, which is not there"
            raise MappingError(f"{path}: {what}; put it there, or name its folder with --calibration", "file")
        if isinstance(file, InRig):
            try:
                read_rig(calibration / file.file).camera(file.camera).check_placed()
            except DataError as error:
                raise MappingError(f"{path}: {field}: {error}", error.rule) from error


def check_robots(mapping: Mapping, path: Path) -> None:
    """Raises DataError for the first robot of a mapping, read from ``path``, of no use or with two grippers."""
    for _, robot in _named(mapping, ""):
        if isinstance(robot, RobotSource):
            robot.open(path)
    for number, arm in enumerate(mapping.arms):
        for where, source in ((f"arms[{number}]", arm), (f"arms[{number}].desired", arm.desired)):
            if source is None or source.gripper is None or source.pose.robot is None:
                continue
            robot = source.pose.robot.open(path)
            if robot.settings.gripper is not None:
                what = f"{where}.gripper is given, and {robot.name} has a gripper among its numbers; keep one of them"
                raise MappingError(f"{path}: {what}", "schema")


def robot_files(mapping: Mapping, path: Path) -> list[Path]:
    """Robot files and descriptions that a mapping, read from ``path``, is applied with. Raises DataError."""
    robots = [robot for _, robot in _named(mapping, "") if isinstance(robot, RobotSource)]
    return list(dict.fromkeys(file for robot in robots for file in robot.files(path)))


def calibration_files(mapping: Mapping, calibration: Path, episode: int) -> list[Path]:
    """Those that one episode is converted with, of the folder ``calibration``; ones that are not there left out."""
    found = []
    for _, file in _named(mapping, ""):
        if isinstance(file, InFile | InRig):
            with contextlib.suppress(KeyError, IndexError, ValueError):  # a template that converting will name
                found.append(calibration / calibration_file_name(file, episode))
    return [path for path in found if path.is_file()]


def calibration_file_name(file: InFile | InRig, episode: int) -> str:
    """``file.file`` filled in. Raises ``KeyError``, ``IndexError`` or ``ValueError`` where it cannot be."""
    return file.file.format(episode_index=episode, episode_chunk=episode // 1000)


def _named(item: object, field: str) -> Iterator[tuple[str, str | InFile | InRig | RobotSource]]:
    """Every column (its name), file and robot that a part of a mapping names, with the field that names it."""
    if isinstance(item, Column):
        yield field, item.name
    elif isinstance(item, InFile | InRig | RobotSource):
        yield field, item
    elif isinstance(item, Values):
        yield from _named(item.pieces, field)
    elif isinstance(item, tuple):
        for index, part in enumerate(item):
            yield from _named(part, field if isinstance(part, Column | InFile) else f"{field}[{index}]")
    elif isinstance(item, dict):
        for name, part in item.items():
            yield from _named(part, f"{field}.{name}")
    elif dataclasses.is_dataclass(item):
        for name in field_names(type(item)):
            part, where = getattr(item, name), f"{field}.{name}".lstrip(".")
            is_name = isinstance(part, str) and (type(item), name) in _COLUMN_FIELDS
            yield from [(where, part)] if is_name else _named(part, where)


def mapping_content(path: Path) -> object:
    """What a mapping file says, as JSON-able values: two mappings of one name are not one setting."""
    return json.loads(json.dumps(read_yaml(path).value, default=str))


def _column(text: str) -> Column:
    match = _COLUMN.fullmatch(text)
    if match is None:
        return Column(text)
    start = int(match["start"])
    stop = start + 1 if match["stop"] is None else int(match["stop"])
    if stop <= start:
        raise Wrong(f"{text!r} takes no numbers")
    return Column(match["name"], start, stop)


def _is_numbers(raw: object) -> bool:
    if isinstance(raw, list):
        return bool(raw) and all(_is_numbers(item) for item in raw)
    return isinstance(raw, int | float) and not isinstance(raw, bool)


def _flat(raw: object) -> list[float]:
    return [number for item in raw for number in _flat(item)] if isinstance(raw, list) else [float(raw)]
