"""LeRobot datasets (v2.0 to v3.0) to episode files: parquet columns by a mapping file, videos left where they are."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Annotated, Literal

import cv2
import numpy as np
import tyro

from data_utils.convert.assemble import assemble
from data_utils.convert.joint_names import check_joint_names
from data_utils.convert.lerobot_layout import BrokenRow, EpisodePlace, Layout, episode_name
from data_utils.convert.mapping import (
    calibration_files,
    check_columns,
    check_files,
    check_robots,
    load_mapping,
    mapping_content,
    robot_files,
)
from data_utils.convert.pairing import Pairing, paired
from data_utils.convert.provenance import state_of
from data_utils.convert.runner import Job
from data_utils.convert.videos import video_index, video_size
from data_utils.errors import DataError
from data_utils.h5io import EpisodeData, VideoFrames
from data_utils.words import one_line

TASK_COLUMN = "task_index"
OWN_COLUMNS = ("timestamp", "frame_index", "episode_index", "index", "task_index")  # of every LeRobot dataset
MAPPING_PATH = "meta/apt_mapping.yaml"  # written by data_utils.export


@dataclass(frozen=True)
class LerobotSettings:
    """What to convert, and how its columns are to be understood."""

    src: Path
    """Folder of the dataset (with meta/info.json)."""
    mapping: str | None = None
    """Mapping file, or the name of a preset (docs/convert.md lists them); a dataset exported from here has its own."""
    calibration: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Folder of the calibration files that the mapping names; the dataset's own where it is not given."""
    videos: Literal["reference", "copy"] = "reference"
    """Leave videos where they are, or put them into OUT/videos too (hard links where possible, else copies)."""


class LerobotConverter:
    """One episode file per episode of a dataset."""

    def __init__(self, settings: LerobotSettings) -> None:
        try:
            import pyarrow.parquet  # noqa: F401
        except ImportError as error:
            raise DataError("the lerobot format needs pyarrow; pip install pyarrow", "file") from error
        self._root = settings.src.resolve()
        if settings.mapping is None and not (self._root / MAPPING_PATH).is_file():
            raise DataError(f"{self._root}: has no {MAPPING_PATH} (not exported from here); give --mapping", "location")
        self._mapping, self._mapping_file = load_mapping(settings.mapping or self._root / MAPPING_PATH)
        self._settings = settings
        extra = tuple(prompt.episode for prompt in self._mapping.prompts if prompt.episode is not None)
        self._layout = Layout(self._root, extra)
        self._calibration = settings.calibration.resolve() if settings.calibration is not None else self._root
        self.copy_videos = settings.videos == "copy"

    def described(self) -> dict:
        """The settings, with the content of the mapping in place of its name."""
        settings = {**dataclasses.asdict(self._settings), "src": self._root}
        return {**settings, "mapping": mapping_content(self._mapping_file), "calibration": self._calibration}

    def jobs(self) -> list[Job]:
        # Before an hour's work is spent on a misspelt name; single episodes may still lack a column.
        check_columns(self._mapping, self._mapping_file, dict.fromkeys([*self._layout.features, *OWN_COLUMNS]))
        check_files(self._mapping, self._mapping_file, self._calibration)
        check_robots(self._mapping, self._mapping_file)
        check_joint_names(self._mapping, self._mapping_file, self._layout.features)
        places, broken = self._layout.episodes()
        jobs = [Job(episode_name(place.index), (place,)) for place in places]
        return jobs + [Job(row.name, (row,)) for row in broken]

    def made_from(self, job: Job) -> dict:
        (place,) = job.key
        if isinstance(place, BrokenRow):
            return {}
        files = [self._root / place.data, *(self._root / video.path for video in place.videos)]
        files += robot_files(self._mapping, self._mapping_file)
        # Tables that grow with every new episode are not files of this one: what they say of it is.
        return {
            "files": state_of([*files, *calibration_files(self._mapping, self._calibration, place.index)]),
            "place": repr(dataclasses.replace(place, tasks=())),
            "tasks": {
                str(index): text
                for index, text in self._tasks.items()
                if isinstance(text, str) and (not place.tasks or text in place.tasks)
            },
        }

    def convert(self, job: Job) -> EpisodeData:
        (place,) = job.key
        if isinstance(place, BrokenRow):
            raise DataError(f"{self._root}/meta: {place.name}, in the table of episodes, {place.what}", "schema")
        recording = _Episode(self._layout, place, self._tasks, self._mapping.pairing)
        attributes = {
            "source": f"LeRobot {self._layout.version}: {self._root.name}",
            "source_episode": place.index,
            "mapping": self._mapping_file.name,
        }
        if self._layout.video_keys:
            attributes["pairing"] = str(self._mapping.pairing)
        if differing := recording.sizes_unlike_the_metadata(camera.frames for camera in self._mapping.cameras.values()):
            attributes["sizes"] = "; ".join(differing)
        return assemble(self._mapping, recording, self._calibration, self._mapping_file, attributes)

    @cached_property
    def _tasks(self) -> dict[int, str | BrokenRow]:
        return self._layout.tasks()


class _Episode:
    """The columns of one episode (see ``data_utils.convert.values.Recording``)."""

    def __init__(
        self, layout: Layout, place: EpisodePlace, tasks: dict[int, str | BrokenRow], pairing: Pairing
    ) -> None:
        import pyarrow

        self._layout, self._episode, self._tasks, self._pairing = layout, place, tasks, pairing
        self._path = layout.root / place.data
        self.place, self.length, self.index = f"{self._path} episode {place.index}", place.length, place.index
        self.video_root, self.fps = str(layout.root), layout.fps
        try:
            self._file = _open_parquet(self._path, self._path.stat().st_mtime_ns)
            self._names = tuple(self._file.schema_arrow.names)
            self._groups, self._skip = self._rows()
            self._order: np.ndarray | None = None  # of the rows as they lie, where it is not that of the frames
            self._order = self._frame_order()
        except (OSError, pyarrow.ArrowException) as error:
            what = f"cannot be read ({one_line(error)}); copy it again"
            raise DataError(f"{self._path}: {what}", "file") from error

    @property
    def columns(self) -> tuple[str, ...]:
        return (*self._names, *(key for key in self._layout.video_keys if key not in self._names))

    def numbers(self, column: str) -> np.ndarray:
        import pyarrow.compute
        import pyarrow.types as kinds

        values = self._read(column)
        while kinds.is_list(values.type) or kinds.is_fixed_size_list(values.type) or kinds.is_large_list(values.type):
            self._check_no_gap(values, column)
            lengths = np.asarray(pyarrow.compute.list_value_length(values))
            if (lengths != lengths[0]).any():
                entry = int(np.argmax(lengths != lengths[0]))
                frame, what = entry * self.length // len(values), f"{lengths[entry]} numbers, {lengths[0]} before"
                raise self._fault(f"column {column!r} has {what}, at frame {frame}", "schema")
            values = values.flatten()
        if not (kinds.is_floating(values.type) or kinds.is_integer(values.type) or kinds.is_boolean(values.type)):
            raise self._fault(f"column {column!r} holds {values.type}; wanted numbers", "schema")
        self._check_no_gap(values, column)
        if len(values) == 0:
            raise self._fault(f"column {column!r} holds no numbers", "schema")
        return np.asarray(values.to_numpy(zero_copy_only=False), np.float64).reshape(self.length, -1)

    def _check_no_gap(self, values, column: str) -> None:
        if values.null_count:
            entry = int(np.argmax(np.asarray(values.is_null())))
            raise self._fault(f"column {column!r} is empty at frame {entry * self.length // len(values)}", "schema")

    def texts(self, column: str) -> list[str]:
        if column == TASK_COLUMN:
            return [self._task_text(index) for index in self._task_indices()]
        found = self._read(column).to_pylist()
        if not all(isinstance(text, str) for text in found):
            raise self._fault(f"column {column!r} does not hold a text at every frame", "prompt")
        return found

    def first(self, column: str) -> object:
        value = self._read(column)[0].as_py()
        return value[0] if isinstance(value, list) and len(value) == 1 else value

    def task(self) -> str:
        if TASK_COLUMN not in self._names:
            raise self._fault(f"no column {TASK_COLUMN!r}, which names the episode's task", "prompt")
        indices = self._task_indices()
        if (changes := np.flatnonzero(np.diff(indices))).size:
            before, now = (self._task_text(indices[frame]) for frame in (changes[0], changes[0] + 1))
            raise self._fault(
                f"its task changes at frame {changes[0] + 1}, from {before!r} to {now!r}; a mapping with subtasks: "
                f"{TASK_COLUMN} (and a prompt of its own) makes sub-tasks of them",
                "prompt",
            )
        return self._task_text(indices[0])

    def _task_indices(self) -> np.ndarray:
        """(T,) integers."""
        found = self.numbers(TASK_COLUMN)[:, 0]
        if not np.isfinite(found).all() or (found != np.round(found)).any():
            raise self._fault(f"column {TASK_COLUMN!r} holds numbers that are not whole", "prompt")
        return found.astype(np.int64)

    def _task_text(self, index: int) -> str:
        if index not in self._tasks:
            raise self._fault(f"task {index} is not in the dataset's table of tasks", "prompt")
        text = self._tasks[index]
        if isinstance(text, BrokenRow):
            raise self._fault(f"{text.name} {text.what}", "prompt")
        return text

    def of_episode(self, key: str) -> object:
        for name, value in self._episode.extra:
            if name == key:
                return value
        raise self._fault(f"the table of episodes has no {key!r}", "prompt")

    def frame_size(self, column: str) -> tuple[int, int]:
        for video in self._episode.videos:
            if video.key == column:
                return video_size(str(self._layout.root / video.path))
        return self._images(column, flip_rows=False).frame_size()

    def sizes_unlike_the_metadata(self, columns: Iterable[str]) -> list[str]:
        """Of which columns ``info.json`` gives another size than the frames have, in words."""
        found = []
        for column in columns:
            with contextlib.suppress(DataError):  # whatever is missing is said when it is used
                said, true = self._layout.frame_size(column), self.frame_size(column)
                if said != true:
                    found.append(f"{column} is {true[0]} x {true[1]}, not {said[0]} x {said[1]} as info.json says")
        return found

    def frames(self, column: str, flip_rows: bool) -> Sequence[np.ndarray] | VideoFrames:
        for video in self._episode.videos:
            if video.key == column:
                if flip_rows:
                    raise self._fault(f"column {column!r} is a video, whose rows cannot be flipped", "image")
                self._check_colors(column)
                times = video.begin + self.numbers("timestamp")[:, 0]
                index = video_index(str(self._layout.root / video.path))
                return VideoFrames(video.path, paired(index, times, self._pairing, video.share))
        self._check_colors(column)
        return self._images(column, flip_rows)

    def _images(self, column: str, flip_rows: bool) -> _Images:
        return _Images(self._read(column), self._layout.root, self.place, column, flip_rows)

    def _check_colors(self, column: str) -> None:
        feature = self._layout.features.get(column, {})
        info = {**(feature.get("video_info") or {}), **(feature.get("info") or {})}
        if info.get("video.is_depth_map") or str(info.get("video.pix_fmt", "")).startswith("gray1"):
            raise self._fault(f"column {column!r} is a depth map; wanted images in colours", "image")

    # -- rows of the file -----------------------------------------------------------------------------------------

    def _rows(self) -> tuple[list[int], int]:
        """The row groups that hold the episode, and the rows of the first of them that come before it."""
        metadata = self._file.metadata
        sizes = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
        first = 0
        if "episode_index" in self._names:
            first, count = _row_range(str(self._path), self._path.stat().st_mtime_ns, self.index)
        else:
            count = metadata.num_rows
        if count != self.length:
            raise self._fault(f"holds {count} frames of it; the metadata say {self.length}", "schema")
        ends = np.cumsum(sizes)
        groups = [group for group, end in enumerate(ends) if end > first and end - sizes[group] < first + count]
        return groups, first - int(ends[groups[0]] - sizes[groups[0]])

    def _frame_order(self) -> np.ndarray | None:
        """What sorts the rows by frame; None where they are in order, or not numbered."""
        if "frame_index" not in self._names:
            return None
        found = self.numbers("frame_index")[:, 0]
        order = np.argsort(found, kind="stable")
        if (found[order] != np.arange(self.length)).any():
            frame = int(np.argmax(found[order] != np.arange(self.length)))
            what = f"column 'frame_index' has no {frame}, or another twice; wanted 0 to {self.length - 1}, each once"
            raise self._fault(what, "schema")
        return None if (order == np.arange(self.length)).all() else order

    def _read(self, column: str):
        """The column's values of this episode, as one pyarrow array."""
        import pyarrow

        if column not in self._names:
            raise self._fault(f"no column {column!r}; there are {', '.join(self._names)}", "schema")
        try:
            values = self._file.read_row_groups(self._groups, columns=[column]).column(0)
        except (OSError, pyarrow.ArrowException) as error:
            what = f"column {column!r} cannot be read ({one_line(error)}); copy it again"
            raise DataError(f"{self._path}: {what}", "file") from error
        values = values.slice(self._skip, self.length).combine_chunks()
        if self._order is not None:
            values = values.take(pyarrow.array(self._order))
        return values.chunk(0) if isinstance(values, pyarrow.ChunkedArray) else values

    def _fault(self, what: str, rule: str) -> DataError:
        return DataError(f"{self.place}: {what}", rule)


class _Images(Sequence):
    """Frames of an image column, decoded when asked for: structs of an encoded image and, or, a path to one."""

    def __init__(self, values, root: Path, place: str, column: str, flip_rows: bool) -> None:
        self._values, self._root, self._flip_rows = values, root, flip_rows
        self._where = f"{place}: column {column!r}"

    def __len__(self) -> int:
        return len(self._values)

    def __getitem__(self, index: int) -> np.ndarray:
        if not 0 <= index < len(self):
            raise IndexError(index)
        data = np.frombuffer(self._encoded(index), np.uint8)
        if data[:2].tobytes() == b"\xff\xd8" and not self._flip_rows:
            return data  # a JPEG goes into the episode file as it is
        image = self._decoded(index, data)
        return image[::-1] if self._flip_rows else image

    def frame_size(self) -> tuple[int, int]:
        """Width and height of the first image."""
        height, width = self._decoded(0, np.frombuffer(self._encoded(0), np.uint8)).shape[:2]
        return width, height

    def _decoded(self, index: int, data: np.ndarray) -> np.ndarray:
        flags = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_ANYDEPTH | cv2.IMREAD_IGNORE_ORIENTATION
        image = cv2.imdecode(data, flags) if data.size else None
        if image is None:
            raise DataError(f"{self._where} at frame {index} is not a decodable image", "image")
        if image.dtype != np.uint8:
            what = f"has {8 * image.itemsize} bits per number, as depth images do; wanted colours of 8"
            raise DataError(f"{self._where} at frame {index} {what}", "image")
        return image

    def _encoded(self, index: int) -> bytes:
        value = self._values[index].as_py()
        if isinstance(value, dict) and value.get("bytes"):
            return value["bytes"]
        if isinstance(value, dict) and value.get("path"):
            path = self._root / value["path"]
            try:
                return path.read_bytes()
            except OSError as error:
                raise DataError(f"{path}: cannot be read ({error.strerror})", "image") from error
        raise DataError(f"{self._where} at frame {index} is {type(value).__name__}; wanted an image", "image")


@lru_cache(maxsize=4)
def _open_parquet(path: Path, mtime_ns: int):
    """``mtime_ns``: of the file, so that one that is written anew is opened anew."""
    import pyarrow.parquet

    return pyarrow.parquet.ParquetFile(path)


@lru_cache(maxsize=4)
def _episode_rows(path: str, mtime_ns: int) -> dict[int, tuple[int, int]]:
    """First row and number of rows of every episode in a file."""
    import pyarrow

    column = _open_parquet(Path(path), mtime_ns).read(columns=["episode_index"]).column(0)
    if column.null_count:
        raise DataError(f"{path}: column 'episode_index' is empty in {column.null_count} rows", "schema")
    try:
        found = np.asarray(column.cast(pyarrow.int64()).to_numpy())
    except pyarrow.ArrowException as error:
        raise DataError(
            f"{path}: column 'episode_index' does not hold whole numbers ({one_line(error)})", "schema"
        ) from error
    starts = np.flatnonzero(np.diff(found, prepend=found[:1] - 1)) if len(found) else np.array([], int)
    ends = np.append(starts[1:], len(found))
    return {int(found[start]): (int(start), int(end - start)) for start, end in zip(starts, ends, strict=True)}


def _row_range(path: str, mtime_ns: int, episode: int) -> tuple[int, int]:
    rows = _episode_rows(path, mtime_ns)
    if episode not in rows:
        raise DataError(f"{path}: holds no episode {episode}; the metadata say it does", "schema")
    return rows[episode]
