"""Write a LeRobot v3.0 dataset from episode files: one parquet file and one video per camera for every episode."""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
import shutil
import signal
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
import yaml

from data_utils.cli import bar
from data_utils.convert.lerobot import MAPPING_PATH
from data_utils.data_loc import find_episodes
from data_utils.errors import DataError
from data_utils.export import plan, statistics
from data_utils.h5io import Episode
from data_utils.video import VideoCache

CHUNK = 1000  # files per folder
FASTEST = 1000  # frames per second; what is faster is no rate of frames, but another unit
DATA_PATH = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
VIDEO_PATH = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
# A key frame every second frame, as LeRobot's own encoder does: single frames are read at random.
ENCODING = {"crf": "18", "preset": "medium", "g": "2", "bf": "0"}


def export(src: Path, out: Path, fps: int | None, workers: int) -> dict:
    """Write the episodes below ``src`` as a LeRobot v3.0 dataset; ``out`` is there whole or not at all.

    Args:
        src: folder of episode files.
        out: folder to make.
        fps: frames per second; None: what the timestamps say.
        workers: processes.
    Returns:
        the dataset's info.
    Raises:
        DataError: no or unreadable episodes, episodes of different kinds, no whole frame rate, or ``out`` exists.
    """
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError as error:
        raise DataError("export needs pyarrow; pip install pyarrow", "file") from error
    if not src.is_dir():
        raise DataError(f"{src}: no such folder; --src is a folder of episode files", "location")
    paths = [Path(path) for path in find_episodes(src, "--src is a folder of them")]
    if out.exists():
        raise DataError(f"{out}: is there already; name a folder that is not", "location")
    if fps is not None and not 1 <= fps <= FASTEST:
        raise DataError(f"--fps is {fps}; wanted frames per second, from 1 to {FASTEST}", "time")
    if workers < 1:
        raise DataError(f"workers is {workers}; wanted at least 1", "location")
    kind, entries = plan.read_entries(paths, _open)
    fps = fps if fps is not None else _frame_rate(entries)
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        dataset = _Dataset(temporary, kind, entries, fps)
        info = dataset.write(workers)
        os.replace(temporary, out)
    except OSError as error:
        raise DataError(f"{out}: cannot be written ({error})", "location") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return info


def _open(path: Path) -> Episode:
    return Episode(path, videos=_videos())


@functools.cache
def _videos() -> VideoCache:
    """This process's decoders: PyAV reads every codec, and frames in order without seeking."""
    return VideoCache("pyav")


def _frame_rate(entries: list[plan.Entry]) -> int:
    rate = 1 / float(np.median([entry.step for entry in entries]))
    if not 1 <= round(rate) <= FASTEST or abs(rate - round(rate)) > 0.02 * rate:
        raise DataError(f"{entries[0].path}: has {rate:.3f} frames a second, no whole number; give --fps", "time")
    return round(rate)


class _Dataset:
    """A dataset while it is being written; picklable, so that processes can write its episodes."""

    def __init__(self, root: Path, kind: plan.Kind, entries: list[plan.Entry], fps: int) -> None:
        self.root, self.kind, self.entries, self.fps = root, kind, entries, fps
        self.tasks = list(dict.fromkeys(entry.prompts[0] for entry in entries))
        self.with_subtasks = any(entry.has_subtasks for entry in entries)
        with _open(entries[0].path) as episode:
            self.sizes = {camera: episode.rgb(camera, 0).shape[:2] for camera in kind.cameras}
        self.features = plan.features(kind, self.sizes, fps, self.with_subtasks)

    def write(self, workers: int) -> dict:
        """All files; returns the info."""
        count = len(self.entries)
        of_episodes: list[dict[str, dict]] = [{}] * count
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(min(workers, count), context, _begin_worker, (self,)) as pool:
            futures = {pool.submit(_write_episode, index): index for index in range(count)}
            try:
                for future in bar(as_completed(futures), total=count, unit="episode"):
                    of_episodes[futures[future]] = future.result()
            except BrokenProcessPool as error:
                raise DataError(f"{self.root}: a worker process was killed (out of memory?)", "file") from error
            finally:
                pool.shutdown(cancel_futures=True)
        return self._write_meta(of_episodes)

    def write_episode(self, index: int) -> dict[str, dict]:
        """Parquet file and videos of one episode; returns its statistics."""
        entry = self.entries[index]
        with _open(entry.path) as episode:
            columns = plan.columns(episode, self.kind, self.with_subtasks)
            T = len(episode)
            columns |= {
                "timestamp": (np.arange(T) / self.fps).astype(np.float32),
                "frame_index": np.arange(T),
                "episode_index": np.full(T, index),
                "index": entry.first + np.arange(T),
                "task_index": np.full(T, self.tasks.index(entry.prompts[0])),
            }
            _write_parquet(_file(self.root, DATA_PATH, index), columns, self.features)
            found = {name: statistics.of_values(v) for name, v in columns.items() if not isinstance(v, list)}
            for camera in self.kind.cameras:
                key = plan.IMAGES.format(camera)
                video = _file(self.root, VIDEO_PATH, index, key)
                found[key] = _encode(episode, camera, video, self.sizes[camera], self.fps)
        return found

    def _write_meta(self, of_episodes: list[dict[str, dict]]) -> dict:
        info = {
            "codebase_version": "v3.0",
            "robot_type": None,
            "total_episodes": len(self.entries),
            "total_frames": self.entries[-1].first + self.entries[-1].length,
            "total_tasks": len(self.tasks),
            "chunks_size": CHUNK,
            "data_files_size_in_mb": 100,
            "video_files_size_in_mb": 200,
            "fps": self.fps,
            "splits": {"train": f"0:{len(self.entries)}"},
            "data_path": DATA_PATH,
            "video_path": VIDEO_PATH,
            "features": self.features,
        }
        meta = self.root / "meta"
        meta.mkdir(exist_ok=True)
        _write_text(meta / "info.json", json.dumps(info, indent=1))
        stats = {name: statistics.combined([item[name] for item in of_episodes]) for name in of_episodes[0]}
        _write_text(meta / "stats.json", json.dumps(stats, indent=1))
        mapping = yaml.safe_dump(plan.mapping(self.kind, self.with_subtasks), sort_keys=False)
        _write_text(self.root / MAPPING_PATH, f"# Makes the exported episodes again.\n{mapping}")
        _write_tasks(meta / "tasks.parquet", self.tasks)
        _write_episodes(meta, [self._row(index, item) for index, item in enumerate(of_episodes)])
        return info

    def _row(self, index: int, stats: dict[str, dict]) -> dict:
        """The episode's row in the table of episodes."""
        entry = self.entries[index]
        row = {"episode_index": index, "tasks": [entry.prompts[0]], "length": entry.length}
        row |= {plan.PROMPTS: list(entry.prompts)}
        row |= {f"data/{name}": value for name, value in _place(index).items()}
        row |= {"dataset_from_index": entry.first, "dataset_to_index": entry.first + entry.length}
        for camera in self.kind.cameras:
            video = f"videos/{plan.IMAGES.format(camera)}"
            row |= {f"{video}/{name}": value for name, value in _place(index).items()}
            row |= {f"{video}/from_timestamp": 0.0, f"{video}/to_timestamp": entry.length / self.fps}
        row |= {f"stats/{name}/{key}": value for name, item in stats.items() for key, value in item.items()}
        return row | {"meta/episodes/chunk_index": 0, "meta/episodes/file_index": 0}


# -- worker processes ---------------------------------------------------------------------------------------------

_dataset: _Dataset | None = None  # of this worker process: sent once, not with every episode


def _begin_worker(dataset: _Dataset) -> None:
    global _dataset
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what a Ctrl-C means
    _dataset = dataset


def _write_episode(index: int) -> dict[str, dict]:
    return _dataset.write_episode(index)


# -- files --------------------------------------------------------------------------------------------------------


def _place(index: int) -> dict[str, int]:
    return {"chunk_index": index // CHUNK, "file_index": index % CHUNK}


def _file(root: Path, template: str, index: int, video_key: str = "") -> Path:
    path = root / template.format(video_key=video_key, **_place(index))
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _encode(episode: Episode, camera: str, path: Path, size: tuple[int, int], fps: int) -> dict[str, list]:
    """All frames of a camera as H.264, one in memory at a time; returns their statistics."""
    import av

    found = statistics.ImageStatistics(len(episode))
    height, width = size
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps, options=ENCODING)
        stream.height, stream.width, stream.pix_fmt = height, width, plan.pixel_format(height, width)
        stream.codec_context.thread_count = 1  # the other cores have episodes of their own
        for index in range(len(episode)):
            image = episode.rgb(camera, index)
            if image.shape[:2] != size:
                what = f"is {image.shape[:2]}, in the first episode {size}; export them separately"
                raise DataError(f"{episode.path}: {camera}/rgb at frame {index} {what}", "image")
            found.add(index, image)
            for packet in stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode(None):
            container.mux(packet)
    _fsync(path)
    return found.result()


def _write_parquet(path: Path, columns: dict[str, np.ndarray | list[str]], features: dict[str, dict]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    arrays = {}
    for name, feature in features.items():
        if feature["dtype"] == "video":
            continue
        values = columns[name]
        if isinstance(values, list) or values.ndim == 1:
            arrays[name] = pa.array(values)
        else:
            flat = pa.array(np.ascontiguousarray(values).reshape(-1))
            arrays[name] = pa.FixedSizeListArray.from_arrays(flat, values.shape[1])
    pq.write_table(pa.table(arrays), path)
    _fsync(path)


def _write_tasks(path: Path, tasks: list[str]) -> None:
    """The texts are the index of a pandas table, which LeRobot's loader relies on."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    def column(name: str, kind: str, stored: str) -> dict:
        return {"name": name, "field_name": name, "pandas_type": kind, "numpy_type": stored, "metadata": None}

    described = {
        "index_columns": ["task"],
        "column_indexes": [],
        "columns": [column("task_index", "int64", "int64"), column("task", "unicode", "object")],
        "creator": {"library": "pyarrow", "version": pa.__version__},
        "pandas_version": "2.0.0",
    }
    table = pa.table({"task_index": pa.array(range(len(tasks)), pa.int64()), "task": tasks})
    pq.write_table(table.replace_schema_metadata({"pandas": json.dumps(described)}), path)
    _fsync(path)


def _write_episodes(meta: Path, rows: list[dict]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = meta / "episodes/chunk-000/file-000.parquet"
    path.parent.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows), path)
    _fsync(path)


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    _fsync(path)


def _fsync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
