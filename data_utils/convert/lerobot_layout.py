"""Where a LeRobot dataset keeps things: versions 2.0, 2.1 (a file per episode) and 3.0 (several episodes per file).

Written from the format's documentation and LeRobot's public sources; the ``lerobot`` package is not needed.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from data_utils.convert.pairing import Share
from data_utils.errors import DataError
from data_utils.words import one_line

VERSIONS = ("v2.0", "v2.1", "v3.0")
EPISODES_PER_FOLDER = 1000  # of an output folder
_ENCODING = "utf-8-sig"  # with a byte-order mark or without


@dataclass(frozen=True)
class VideoPlace:
    """Where the frames of a video column are.

    Args:
        key: of the column.
        path: relative to the dataset.
        begin: seconds in it at which the episode begins.
        share: what of its frames are the episode's.
    """

    key: str
    path: str
    begin: float
    share: Share


@dataclass(frozen=True)
class EpisodePlace:
    """Where one episode is.

    Args:
        index: number of the episode.
        length: frames.
        data: parquet file, relative to the dataset.
        extra: what else the table of episodes says, for mappings that ask for it.
        tasks: the texts that it lists, where it does.
    """

    index: int
    length: int
    data: str
    videos: tuple[VideoPlace, ...]
    extra: tuple[tuple[str, object], ...] = ()
    tasks: tuple[object, ...] = ()


@dataclass(frozen=True)
class BrokenRow:
    """A row of the table of episodes that is of no use, or an episode that has several.

    Args:
        name: what the episode would be called, or the row's number where that is not known.
        what: is wrong with it.
    """

    name: str
    what: str


class Layout:
    """The metadata of a dataset.

    Args:
        root: folder with ``meta/info.json``.
        extra: further keys of the table of episodes to keep (version 3.0).
    Raises:
        DataError: not a dataset, or of another version.
    """

    def __init__(self, root: Path, extra: tuple[str, ...] = ()) -> None:
        self.root, self._extra = root, extra
        path = root / "meta/info.json"
        info = _json(path)
        self.version = str(info.get("codebase_version"))
        if self.version not in VERSIONS:
            what = (
                f"codebase_version is {self.version}; this reads {', '.join(VERSIONS)}: convert it with LeRobot first"
            )
            raise DataError(f"{path}: {what}", "version")
        try:
            self.features: dict[str, dict] = dict(info["features"])
            self._data_path: str = info["data_path"]
            self._video_path: str | None = info.get("video_path")
            self._chunks_size = int(info.get("chunks_size", 1000))
            self.fps = float(info["fps"])
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{path}: lacks {error}; is it whole?", "schema") from error

    @property
    def video_keys(self) -> list[str]:
        return [key for key, feature in self.features.items() if feature.get("dtype") == "video"]

    def frame_size(self, key: str) -> tuple[int, int]:
        """Width and height of an image or video column, as the metadata say."""
        feature = self.features[key]
        shape, names = feature.get("shape"), feature.get("names")
        if isinstance(shape, list) and len(shape) == 3:
            named_first = isinstance(names, list) and str(names[0]).startswith("channel")
            channels_first = named_first or (shape[0] == 3 and shape[2] != 3)
            height, width = shape[1:] if channels_first else shape[:2]
            return int(width), int(height)
        raise DataError(f"{self.root}/meta/info.json: feature {key!r} has shape {shape}; wanted three numbers", "image")

    def episodes(self) -> tuple[list[EpisodePlace], list[BrokenRow]]:
        """Every episode, in order, and what cannot be one. Raises DataError where the table as a whole is of no use."""
        rows = list(self._rows_v3() if self.version == "v3.0" else _json_lines(self.root / "meta/episodes.jsonl"))
        if not rows:
            raise DataError(f"{self.root}/meta: the table of episodes is empty; is it whole?", "schema")
        found: dict[int, list[EpisodePlace | str]] = {}
        broken = []
        place = self._place_v3 if self.version == "v3.0" else self._place_v2
        for number, row in enumerate(rows):
            try:
                index = _whole(row, "episode_index", least=0)
            except (KeyError, TypeError, ValueError) as error:
                broken.append(BrokenRow(f"row_{number:06d}", _words(error)))
                continue
            try:
                found.setdefault(index, []).append(place(row, index))
            except (KeyError, TypeError, ValueError) as error:
                found[index].append(_words(error))
        places = []
        for index, given in sorted(found.items()):
            if len(given) == 1 and isinstance(given[0], EpisodePlace):
                places.append(given[0])
            else:
                what = given[0] if len(given) == 1 else f"is listed {len(given)} times"
                broken.append(BrokenRow(episode_name(index), what))
        if (
            not places
            and len(what := {row.what for row in broken}) == 1
            and (lacking := what.pop()).startswith("lacks")
        ):
            raise DataError(f"{self.root}/meta: the table of episodes {lacking}; is it whole?", "schema")
        return self._sharing_videos(places), broken

    def tasks(self) -> dict[int, str | BrokenRow]:
        """Instruction by task index; what is no instruction is told when it is asked for."""
        if self.version == "v3.0":
            path = self.root / "meta/tasks.parquet"
            rows = _rows(path)
            key = next((key for key in ("task", "__index_level_0__") if rows and key in rows[0]), None)
            texts = [name for name in (rows[0] if rows else {}) if name != "task_index"]
            if rows and key is None and len(texts) != 1:
                raise DataError(f"{path}: has columns {list(rows[0])}; wanted task_index and task", "schema")
            key = key or (texts[0] if texts else "task")
        else:
            path, key = self.root / "meta/tasks.jsonl", "task"
            rows = _json_lines(path)
        found: dict[int, str | BrokenRow] = {}
        for number, row in enumerate(rows):
            try:
                index = _whole(row, "task_index", least=0)
            except (KeyError, TypeError, ValueError) as error:
                raise DataError(f"{path}: row {number} {_words(error)}", "prompt") from error
            text = row.get(key)
            if index in found:
                found[index] = BrokenRow(f"task {index}", f"is listed twice in {path}")
            elif isinstance(text, str):
                found[index] = text
            else:
                found[index] = BrokenRow(f"task {index}", f"is {text!r} in {path}; wanted a text")
        return found

    def _place_v2(self, row: dict, index: int) -> EpisodePlace:
        names = {"episode_index": index, "episode_chunk": index // self._chunks_size}
        length = _whole(row, "length", least=1)
        videos = tuple(
            VideoPlace(key, self._filled(self._video_path, video_key=key, **names), 0.0, Share(0, length))
            for key in self.video_keys
        )
        data = self._filled(self._data_path, **names)
        extra = tuple((key, _frozen(row[key])) for key in self._extra if key in row)
        return EpisodePlace(index, length, data, videos, extra, _listed(row.get("tasks")))

    def _rows_v3(self) -> Iterator[dict]:
        files = sorted((self.root / "meta/episodes").glob("chunk-*/file-*.parquet"))
        if not files:
            raise DataError(f"{self.root}/meta/episodes: holds no chunk-*/file-*.parquet; is it whole?", "file")
        videos = [f"videos/{key}" for key in self.video_keys]
        columns = ["episode_index", "length", "tasks", "data/chunk_index", "data/file_index", *self._extra]
        columns += [f"{video}/{name}" for video in videos for name in ("chunk_index", "file_index", "from_timestamp")]
        for path in files:
            yield from _rows(path, columns)

    def _place_v3(self, row: dict, index: int) -> EpisodePlace:
        def place(prefix: str) -> dict[str, int]:
            return {name: _whole(row, f"{prefix}/{name}", least=0) for name in ("chunk_index", "file_index")}

        length = _whole(row, "length", least=1)
        videos = tuple(
            VideoPlace(
                key,
                self._filled(self._video_path, video_key=key, **place(f"videos/{key}")),
                _seconds(row, f"videos/{key}/from_timestamp"),
                Share(0, length),
            )
            for key in self.video_keys
        )
        data = self._filled(self._data_path, **place("data"))
        extra = tuple((key, _frozen(row[key])) for key in self._extra if key in row)
        return EpisodePlace(index, length, data, videos, extra, _listed(row.get("tasks")))

    @staticmethod
    def _sharing_videos(places: list[EpisodePlace]) -> list[EpisodePlace]:
        """The same, each told what part of its videos is its own."""
        sharing: dict[str, list[tuple[float, int, int]]] = {}
        for place in places:
            for video in place.videos:
                sharing.setdefault(video.path, []).append((video.begin, place.index, place.length))
        shares: dict[tuple[str, int], Share] = {}
        for path, episodes in sharing.items():
            before, in_all = 0, sum(length for _, _, length in episodes)
            for _, index, length in sorted(episodes):
                shares[path, index] = Share(before, in_all)
                before += length
        return [
            dataclasses.replace(
                place,
                videos=tuple(dataclasses.replace(v, share=shares[v.path, place.index]) for v in place.videos),
            )
            for place in places
        ]

    def _filled(self, template: str | None, **names) -> str:
        try:
            return template.format(**names)
        except (AttributeError, KeyError, IndexError, ValueError) as error:
            what = f"path template {template!r} cannot be filled in with {', '.join(names)}"
            raise DataError(f"{self.root}/meta/info.json: {what}", "schema") from error


def episode_name(index: int) -> str:
    """What the file of an episode is called, without its suffix."""
    return f"chunk-{index // EPISODES_PER_FOLDER:03d}/episode_{index:06d}"


def _whole(row: dict, key: str, least: int) -> int:
    """A whole number of a row. Raises ``KeyError``, ``TypeError``, ``ValueError``."""
    value = row[key]
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value or value != int(value):
        raise ValueError(f"has {key} {value!r}; wanted a whole number")
    if value < least:
        raise ValueError(f"has {key} {int(value)}; wanted at least {least}")
    return int(value)


def _seconds(row: dict, key: str) -> float:
    value = row[key]
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value < 0:
        raise ValueError(f"has {key} {value!r}; wanted seconds from a video's beginning")
    return float(value)


def _words(error: Exception) -> str:
    if isinstance(error, KeyError):
        return f"lacks {error}"
    return "is no mapping from names" if isinstance(error, TypeError) else str(error)


def _listed(value: object) -> tuple[object, ...]:
    return tuple(map(str, value)) if isinstance(value, list) else ()


def _frozen(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


def _json(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding=_ENCODING))
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file; --src is the folder of a LeRobot dataset", "location") from error
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({one_line(error)})", "file") from error


def _json_lines(path: Path) -> list[dict]:
    try:
        # Texts may hold characters that str.splitlines takes for the end of a line.
        return [json.loads(line) for line in path.read_text(encoding=_ENCODING).split("\n") if line.strip()]
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({one_line(error)})", "file") from error


def _rows(path: Path, columns: list[str] | None = None) -> list[dict]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        there = set(file.schema_arrow.names)
        wanted = None if columns is None else [name for name in columns if name in there]
        return file.read(columns=wanted).to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{path}: cannot be read ({one_line(error)})", "file") from error
