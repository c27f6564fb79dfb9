"""Small episodes for tests: smooth motions, coloured frames."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import h5py
import numpy as np
from scipy.spatial.transform import Rotation

from data_utils.config import DataConfig
from data_utils.h5io import EpisodeWriter, seal
from data_utils.types import TokenizedPrompt

CAMERAS = ("front", "wrist")


def config(**changes) -> DataConfig:
    """Two cameras, one arm, small images, no augmentation but the camera order."""
    values = dict(
        cameras=CAMERAS,
        wrist_cameras=("wrist",),
        ee_ref_cams=(CAMERAS,),
        num_history=3,
        num_future=4,
        image_hw=(32, 32),
        aug_crop=False,
        aug_color=False,
        aug_blur=False,
    )
    return DataConfig(**{**values, **changes})


def poses(times: np.ndarray, num_arms: int = 1, offset: float = 0.0) -> np.ndarray:
    """(T, Nee, 4, 4): arm a turns about z at 0.3 rad/s and moves along x at 0.1 m/s, starting at y = a."""
    out = np.tile(np.eye(4), (len(times), num_arms, 1, 1))
    for arm in range(num_arms):
        out[:, arm, :3, :3] = Rotation.from_euler("z", 0.3 * (times + offset)[:, None]).as_matrix()
        out[:, arm, 0, 3] = 0.1 * (times + offset)
        out[:, arm, 1, 3] = arm
    return out


def camera_pose(camera: int) -> np.ndarray:
    pose = np.eye(4)
    pose[:3, 3] = (camera, 0.0, 1.0)
    return pose


def write_episode(
    path: Path,
    frames: int = 12,
    num_arms: int = 1,
    cameras: tuple[str, ...] = CAMERAS,
    image_hw: tuple[int, int] = (24, 32),
    dt: float = 0.5,
    desired: bool = False,
    prompts: str | list[str] = "pick up the cube",
) -> Path:
    """Frame t of camera c is filled with (10 * t, 100 * c, 200); commands lead the state by one step."""
    times = np.arange(frames) * dt
    state, command = poses(times, num_arms), poses(times, num_arms, offset=dt)
    K = np.array([[30.0, 0.0, 16.0], [0.0, 30.0, 12.0], [0.0, 0.0, 1.0]])
    with EpisodeWriter(path, list(cameras), num_arms, prompts, overwrite=True) as writer:
        for t in range(frames):
            images = {
                camera: np.full((*image_hw, 3), (10 * t, 100 * c, 200), np.uint8) for c, camera in enumerate(cameras)
            }
            writer.add_frame(
                times[t],
                state[t],
                np.full(num_arms, t / frames),
                images,
                {camera: camera_pose(c) for c, camera in enumerate(cameras)},
                dict.fromkeys(cameras, K),
                command[t] if desired else None,
                np.full(num_arms, min(1.0, (t + 1) / frames)) if desired else None,
            )
    return path


@contextmanager
def edited(path: Path) -> Iterator[h5py.File]:
    """The file open for a change made on purpose: its checksums follow."""
    with h5py.File(path, "r+") as file:
        yield file
        if "schema_version" in file.attrs:
            seal(file)


def tokenize(prompt: str, cameras: int) -> TokenizedPrompt:
    """One token per camera, then one per byte."""
    ids = np.array([300] * cameras + list(prompt.encode()), np.int64)
    return TokenizedPrompt(ids, np.tile(np.arange(len(ids)), (3, 1)))
