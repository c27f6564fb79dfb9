"""LeRobot datasets (v2.0 to v3.0) to episode files: parquet columns by a mapping file, videos left where they are."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Annotated, Literal

import cv2
import numpy as np
import tyro

from data_utils.convert.assemble import assemble
from data_utils.convert.lerobot_layout import EpisodePlace, Layout
from data_utils.convert.mapping import check_columns, check_files, load_mapping, mapping_content
from data_utils.convert.runner import Job
from data_utils.convert.videos import video_index
from data_utils.errors import DataError
from data_utils.h5io import EpisodeData, VideoFrames
from data_utils.video import nearest_frame
from data_utils.words import one_line

EPISODES_PER_FOLDER = 1000
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
        return [
            Job(f"chunk-{place.index // EPISODES_PER_FOLDER:03d}/episode_{place.index:06d}", (place,))
            for place in self._layout.episodes()
        ]

    def convert(self, job: Job) -> EpisodeData:
        (place,) = job.key
        recording = _Episode(self._layout, place, self._tasks)
        attributes = {
            "source": f"LeRobot {self._layout.version}: {self._root.name}",
            "source_episode": place.index,
            "mapping": self._mapping_file.name,
        }
        return assemble(self._mapping, recording, self._calibration, self._mapping_file, attributes)

    @cached_property
    def _tasks(self) -> dict[int, str]:
        return self._layout.tasks()


class _Episode:
    """The columns of one episode (see ``data_utils.convert.values.Recording``)."""

    def __init__(self, layout: Layout, place: EpisodePlace, tasks: dict[int, str]) -> None:
        import pyarrow

        self._layout, self._episode, self._tasks = layout, place, tasks
        self._path = layout.root / place.data
        self.place, self.length, self.index = f"{self._path} episode {place.index}", place.length, place.index
        self.video_root, self.fps = str(layout.root), layout.fps
        try:
            self._file = _open_parquet(self._path)
            self._names = tuple(self._file.schema_arrow.names)
            self._groups, self._skip = self._rows()
        except (OSError, pyarrow.ArrowException) as error:
            what = f"cannot be read ({one_line(error)}); copy it again"
            raise DataError(f"{self._path}: {what}", "file") from error

    @property
    def columns(self) -> tuple[str, ...]:
        return (*self._names, *(key for key in self._layout.video_keys if key not in self._names))

    def numbers(self, column: str) -> np.ndarray:
        import pyarrow.types as kinds

        values = self._read(column)
        while kinds.is_list(values.type) or kinds.is_fixed_size_list(values.type) or kinds.is_large_list(values.type):
            values = values.flatten()
        if not (kinds.is_floating(values.type) or kinds.is_integer(values.type) or kinds.is_boolean(values.type)):
            raise self._fault(f"column {column!r} holds {values.type}; wanted numbers", "schema")
        if values.null_count:
            raise self._fault(f"column {column!r} has empty entries", "schema")
        if len(values) == 0 or len(values) % self.length:
            raise self._fault(f"column {column!r} does not hold equally many numbers at every frame", "schema")
        return np.asarray(values.to_numpy(zero_copy_only=False), np.float64).reshape(self.length, -1)

    def texts(self, column: str) -> list[str]:
        found = self._read(column).to_pylist()
        if not all(isinstance(text, str) for text in found):
            raise self._fault(f"column {column!r} does not hold a text at every frame", "prompt")
        return found

    def first(self, column: str) -> object:
        value = self._read(column)[0].as_py()
        return value[0] if isinstance(value, list) and len(value) == 1 else value

    def task(self) -> str:
        if "task_index" not in self._names:
            raise self._fault("no column 'task_index', which names the episode's task", "prompt")
        index = int(self.numbers("task_index")[0, 0])
        if index not in self._tasks:
            raise self._fault(f"task {index} is not in the dataset's table of tasks", "prompt")
        return self._tasks[index]

    def of_episode(self, key: str) -> object:
        for name, value in self._episode.extra:
            if name == key:
                return value
        raise self._fault(f"the table of episodes has no {key!r}", "prompt")

    def frame_size(self, column: str) -> tuple[int, int]:
        return self._layout.frame_size(column)

    def frames(self, column: str, flip_rows: bool) -> Sequence[np.ndarray] | VideoFrames:
        for key, video, begin in self._episode.videos:
            if key == column:
                if flip_rows:
                    raise self._fault(f"column {column!r} is a video, whose rows cannot be flipped", "image")
                times = begin + self.numbers("timestamp")[:, 0]
                _check_video(str(self._layout.root / video), times)
                return VideoFrames(video, times)
        return _Images(self._read(column), self._layout.root, self.place, column, flip_rows)

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
        image = cv2.imdecode(data, cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION) if data.size else None
        if image is None:
            raise DataError(f"{self._where} at frame {index} is not a decodable image", "image")
        return image[::-1] if self._flip_rows else image

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
def _open_parquet(path: Path):
    import pyarrow.parquet

    return pyarrow.parquet.ParquetFile(path)


@lru_cache(maxsize=4)
def _episode_rows(path: str, mtime_ns: int) -> dict[int, tuple[int, int]]:
    """First row and number of rows of every episode in a file."""
    found = np.asarray(_open_parquet(Path(path)).read(columns=["episode_index"]).column(0).to_numpy())
    starts = np.flatnonzero(np.diff(found, prepend=found[:1] - 1)) if len(found) else np.array([], int)
    ends = np.append(starts[1:], len(found))
    return {int(found[start]): (int(start), int(end - start)) for start, end in zip(starts, ends, strict=True)}


def _row_range(path: str, mtime_ns: int, episode: int) -> tuple[int, int]:
    rows = _episode_rows(path, mtime_ns)
    if episode not in rows:
        raise DataError(f"{path}: holds no episode {episode}; the metadata say it does", "schema")
    return rows[episode]


def _check_video(path: str, times: np.ndarray) -> None:
    """Raises DataError where the video lacks a frame for one of ``times`` (T,); nothing is decoded."""
    index = video_index(path)
    for time in times.tolist():
        nearest_frame(index, time)
