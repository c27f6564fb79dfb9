"""Episodes to measure with: two cameras over a scene that looks like one to a coder."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import cv2
import h5py
import numpy as np
from scipy.spatial.transform import Rotation

from data_utils.h5io import CameraData, EpisodeData, VideoFrames, seal, write_episode

CAMERAS = ("e2h_cam", "eih_cam")
FPS = 10


def make_frames(rng: np.random.Generator, ground: np.ndarray, frames: int) -> list[np.ndarray]:
    """Frames (H, W, 3) that look like a scene to a coder: shaded, noisy ground, and boxes that move over it."""
    side = len(ground)
    boxes = [(rng.integers(0, side - 60, 2), rng.integers(20, 60, 2), rng.integers(0, 255, 3)) for _ in range(8)]
    images = []
    for t in range(frames):
        image = ground.copy()
        for (y, x), (h, w), color in boxes:
            image[y : y + h, (x + t) % (side - 60) :][:, :w] = color
        images.append(image)
    return images


def make_episodes(folder: Path, episodes: int, frames: int, side: int, key_frames: int) -> dict[str, list[Path]]:
    """The same episodes in each way that frames are stored: "jpeg", "raw", "video"."""
    rng = np.random.default_rng(0)
    ground = cv2.resize(rng.integers(60, 200, (6, 6, 3), dtype=np.uint8), (side, side), interpolation=cv2.INTER_CUBIC)
    ground = cv2.add(ground, rng.integers(0, 12, ground.shape, dtype=np.uint8))
    K = np.array([[0.86 * side, 0.0, side / 2], [0.0, 0.86 * side, side / 2], [0.0, 0.0, 1.0]])
    times = np.arange(frames) / FPS
    poses = np.tile(np.eye(4), (frames, 1, 1, 1))
    poses[:, 0, :3, :3] = Rotation.from_rotvec(np.outer(np.arange(frames), [0.01, 0.02, 0.0])).as_matrix()
    poses[:, 0, 0, 3] = 0.001 * np.arange(frames)
    paths: dict[str, list[Path]] = {"jpeg": [], "raw": [], "video": []}
    for episode in range(episodes):
        images = {camera: make_frames(rng, ground, frames) for camera in CAMERAS}
        for kind, found in paths.items():
            cameras = {}
            for camera in CAMERAS:
                content = images[camera]
                if kind == "video":
                    name = f"{episode:04d}_{camera}.mp4"
                    write_video(folder / name, content, key_frames)
                    content = VideoFrames(name, times)
                cameras[camera] = CameraData(np.eye(4), K, content)
            path = folder / f"{episode:04d}_{kind}.h5"
            write_episode(path, EpisodeData(times, poses, np.full((frames, 1), 0.5), ["pick up the can"], cameras))
            if kind == "raw":
                with h5py.File(path, "r+") as file:
                    for camera in CAMERAS:
                        del file[f"{camera}/rgb"]
                        file[f"{camera}/rgb"] = np.stack(images[camera]).transpose(0, 3, 1, 2)
                    seal(file)
            found.append(path)
    return paths


def write_video(path: Path, images: list[np.ndarray], key_frames: int) -> None:
    options = {"g": str(key_frames), "crf": "23", "sc_threshold": "0"}
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(FPS), options=options)
        stream.height, stream.width = images[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        for image in images:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
