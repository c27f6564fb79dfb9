"""Where a LeRobot dataset keeps things: versions 2.0, 2.1 (a file per episode) and 3.0 (several episodes per file).

Written from the format's documentation and LeRobot's public sources; the ``lerobot`` package is not needed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from data_utils.errors import DataError
from data_utils.words import one_line

VERSIONS = ("v2.0", "v2.1", "v3.0")


@dataclass(frozen=True)
class EpisodePlace:
    """Where one episode is.

    Args:
        index: number of the episode.
        length: frames.
        data: parquet file, relative to the dataset.
        videos: per video key, the file relative to the dataset and the seconds in it at which the episode begins.
        extra: what else the table of episodes says, for mappings that ask for it.
    """

    index: int
    length: int
    data: str
    videos: tuple[tuple[str, str, float], ...]
    extra: tuple[tuple[str, object], ...] = ()


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

    def episodes(self) -> list[EpisodePlace]:
        """Every episode, in order."""
        try:
            found = list(self._episodes_v3() if self.version == "v3.0" else self._episodes_v2())
        except (KeyError, TypeError) as error:
            what = f"the table of episodes lacks {error}; is it whole?"
            raise DataError(f"{self.root}/meta: {what}", "schema") from error
        return sorted(found, key=lambda place: place.index)

    def tasks(self) -> dict[int, str]:
        """Instruction by task index."""
        if self.version == "v3.0":
            path = self.root / "meta/tasks.parquet"
            rows = _rows(path)
            texts = [name for name in (rows[0] if rows else {}) if name != "task_index"]
            if rows and len(texts) != 1:
                raise DataError(f"{path}: has columns {list(rows[0])}; wanted task_index and the text", "schema")
            return {int(row["task_index"]): str(row[texts[0]]) for row in rows}
        return {int(row["task_index"]): str(row["task"]) for row in _json_lines(self.root / "meta/tasks.jsonl")}

    def _episodes_v2(self) -> Iterator[EpisodePlace]:
        for row in _json_lines(self.root / "meta/episodes.jsonl"):
            index = int(row["episode_index"])
            names = {"episode_index": index, "episode_chunk": index // self._chunks_size}
            videos = ((key, self._filled(self._video_path, video_key=key, **names), 0.0) for key in self.video_keys)
            data = self._filled(self._data_path, **names)
            extra = tuple((key, _frozen(row[key])) for key in self._extra if key in row)
            yield EpisodePlace(index, int(row["length"]), data, tuple(videos), extra)

    def _episodes_v3(self) -> Iterator[EpisodePlace]:
        files = sorted((self.root / "meta/episodes").glob("chunk-*/file-*.parquet"))
        if not files:
            raise DataError(f"{self.root}/meta/episodes: holds no chunk-*/file-*.parquet; is it whole?", "file")
        videos = [f"videos/{key}" for key in self.video_keys]
        columns = ["episode_index", "length", "data/chunk_index", "data/file_index", *self._extra]
        columns += [f"{video}/{name}" for video in videos for name in ("chunk_index", "file_index", "from_timestamp")]
        for path in files:
            yield from (self._place_v3(row) for row in _rows(path, columns))

    def _place_v3(self, row: dict) -> EpisodePlace:
        def place(prefix: str) -> dict[str, int]:
            return {name: int(row[f"{prefix}/{name}"]) for name in ("chunk_index", "file_index")}

        videos = tuple(
            (
                key,
                self._filled(self._video_path, video_key=key, **place(f"videos/{key}")),
                float(row[f"videos/{key}/from_timestamp"]),
            )
            for key in self.video_keys
        )
        data = self._filled(self._data_path, **place("data"))
        extra = tuple((key, _frozen(row[key])) for key in self._extra if key in row)
        return EpisodePlace(int(row["episode_index"]), int(row["length"]), data, videos, extra)

    def _filled(self, template: str | None, **names) -> str:
        try:
            return template.format(**names)
        except (AttributeError, KeyError, IndexError, ValueError) as error:
            what = f"path template {template!r} cannot be filled in with {', '.join(names)}"
            raise DataError(f"{self.root}/meta/info.json: {what}", "schema") from error


def _frozen(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


def _json(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file; --src is the folder of a LeRobot dataset", "location") from error
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({one_line(error)})", "file") from error


def _json_lines(path: Path) -> list[dict]:
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
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
