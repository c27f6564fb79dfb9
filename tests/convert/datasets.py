"""Small LeRobot datasets in both layouts, with real H.264 videos, written from the format's documentation."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass, field
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

FPS = 10


@dataclass
class Episode:
    """Columns of one episode: arrays (T, ...) of numbers, lists of texts; frames (T, H, W, 3) uint8 per camera."""

    columns: dict[str, object]
    videos: dict[str, np.ndarray] = field(default_factory=dict)
    images: dict[str, np.ndarray] = field(default_factory=dict)
    task: str = "push the cup"
    fps: int = FPS

    @property
    def length(self) -> int:
        return len(next(iter((self.videos | self.images).values())))


def frames(length: int, seed: int = 0, size: tuple[int, int] = (48, 64)) -> np.ndarray:
    """(T, H, W, 3) uint8: one colour per frame, so that codecs keep it."""
    colors = np.random.default_rng(seed).integers(40, 216, (length, 1, 1, 3))
    return np.broadcast_to(colors, (length, *size, 3)).astype(np.uint8)


def write_video(path: Path, images: np.ndarray, fps: int = FPS) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        options = {"crf": "10", "g": "2", "preset": "ultrafast"}
        stream = container.add_stream("libx264", rate=fps, options=options)
        stream.height, stream.width = images.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for image in images:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")))
        container.mux(stream.encode(None))


def write_v21(root: Path, episodes: list[Episode]) -> Path:
    """A file per episode."""
    tasks = list(dict.fromkeys(episode.task for episode in episodes))
    data = "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet"
    video = "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4"
    _write_info(root, "v2.1", episodes[0], data, video)
    rows, first = [], 0
    for index, episode in enumerate(episodes):
        table = _table(episode, index, first, tasks.index(episode.task))
        path = root / data.format(episode_chunk=0, episode_index=index)
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, path)
        for key, images in episode.videos.items():
            write_video(root / video.format(episode_chunk=0, video_key=key, episode_index=index), images, episode.fps)
        rows.append({"episode_index": index, "tasks": [episode.task], "length": episode.length})
        first += episode.length
    _write_lines(root / "meta/episodes.jsonl", rows)
    _write_lines(root / "meta/tasks.jsonl", [{"task_index": i, "task": task} for i, task in enumerate(tasks)])
    return root


def write_v30(root: Path, episodes: list[Episode], per_file: int = 2, extra: list[dict] | None = None) -> Path:
    """Several episodes per parquet file and per video."""
    tasks = list(dict.fromkeys(episode.task for episode in episodes))
    data = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
    video = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
    _write_info(root, "v3.0", episodes[0], data, video)
    rows, first = [], 0
    for file_index, start in enumerate(range(0, len(episodes), per_file)):
        group = episodes[start : start + per_file]
        place = {"chunk_index": 0, "file_index": file_index}
        tables, begin = [], 0
        for index, episode in enumerate(group, start):
            tables.append(_table(episode, index, first, tasks.index(episode.task)))
            row = {"episode_index": index, "tasks": [episode.task], "length": episode.length}
            row |= {f"data/{name}": value for name, value in place.items()}
            row |= {"dataset_from_index": first, "dataset_to_index": first + episode.length}
            for key in episode.videos:
                row |= {f"videos/{key}/{name}": value for name, value in place.items()}
                row |= {f"videos/{key}/from_timestamp": begin / episode.fps}
                row |= {f"videos/{key}/to_timestamp": (begin + episode.length) / episode.fps}
            rows.append(row | (extra[index] if extra else {}))
            first += episode.length
            begin += episode.length
        path = root / data.format(**place)
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.concat_tables(tables), path, row_group_size=7)
        for key in group[0].videos:
            images = np.concatenate([episode.videos[key] for episode in group])
            write_video(root / video.format(video_key=key, **place), images, group[0].fps)
    path = root / "meta/episodes/chunk-000/file-000.parquet"
    path.parent.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows), path)
    pq.write_table(
        pa.table({"task_index": list(range(len(tasks))), "__index_level_0__": tasks}), root / "meta/tasks.parquet"
    )
    return root


def _write_info(root: Path, version: str, episode: Episode, data: str, video: str) -> None:
    features: dict[str, dict] = {}
    for key, values in episode.columns.items():
        is_text = isinstance(values, list)
        shape = [1] if is_text else list(np.shape(values)[1:]) or [1]
        features[key] = {"dtype": "string" if is_text else str(np.asarray(values).dtype), "shape": shape, "names": None}
    for kind, cameras in (("video", episode.videos), ("image", episode.images)):
        for key, images in cameras.items():
            features[key] = {"dtype": kind, "shape": list(images.shape[1:]), "names": ["height", "width", "channels"]}
    info = {"codebase_version": version, "fps": episode.fps, "chunks_size": 1000, "features": features}
    info |= {"data_path": data, "video_path": video if episode.videos else None}
    (root / "meta").mkdir(parents=True)
    (root / "meta/info.json").write_text(json.dumps(info))


def _table(episode: Episode, index: int, first: int, task: int) -> pa.Table:
    T = episode.length
    arrays = {key: _array(values) for key, values in episode.columns.items()}
    for key, images in episode.images.items():
        arrays[key] = pa.array([{"bytes": _png(image), "path": f"frame_{t:06d}.png"} for t, image in enumerate(images)])
    arrays |= {
        "timestamp": pa.array((np.arange(T) / episode.fps).astype(np.float32)),
        "frame_index": pa.array(np.arange(T)),
        "episode_index": pa.array(np.full(T, index)),
        "index": pa.array(np.arange(first, first + T)),
        "task_index": pa.array(np.full(T, task)),
    }
    return pa.table(arrays)


def _array(values: object) -> pa.Array:
    return pa.array(values if isinstance(values, list) or np.ndim(values) == 1 else np.asarray(values).tolist())


def _png(image: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "png")
    return stream.getvalue()


def _write_lines(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
