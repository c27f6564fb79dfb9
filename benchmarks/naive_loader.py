"""The straightforward dataset that ``benchmarks/loader.py`` measures against.

What one writes first: every sample opens its file, reads whole arrays, decodes with OpenCV, interpolates one time step
after another on SO(3), and makes float32 images and a coordinate map per pixel. It holds the same content as the
dictionary form of this library's samples.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import cv2
import h5py
import numpy as np
from scipy.spatial.transform import Rotation, Slerp
from torch.utils.data import Dataset


class NaiveDataset(Dataset):
    """Item i is a random frame of episode ``i % len(paths)``; one arm, cameras without masks, images as stored.

    Args:
        paths: episode files whose cameras hold JPEGs, or paths of videos with ``video_time``.
        cameras: their names.
        num_future: states after the present one, one second apart.
        frames: episode and frame of every item, so that another loader can be given the same; (length, 2).
    """

    def __init__(self, paths: Sequence[Path], cameras: Sequence[str], num_future: int, frames: np.ndarray) -> None:
        self.paths, self.cameras, self.num_future, self.frames = list(paths), tuple(cameras), num_future, frames

    def __len__(self) -> int:
        return len(self.frames)

    def __getitem__(self, item: int) -> dict[str, np.ndarray]:
        episode, frame = (int(value) for value in self.frames[item])
        path = self.paths[episode]
        with h5py.File(path, "r") as file:
            times, poses, gripper = file["timestamp"][:], file["ee_pose"][:], file["gripper"][:]
            images, maps, extrinsics = [], [], []
            for camera in self.cameras:
                rgb = self._image(file, path, camera, frame)
                K = file[f"{camera}/K"][:]
                images.append(rgb.transpose(2, 0, 1).astype(np.float32) / 255.0)
                u, v = np.meshgrid(np.arange(rgb.shape[1]), np.arange(rgb.shape[0]))
                maps.append(np.stack([(u - K[0, 2]) / K[0, 0], (v - K[1, 2]) / K[1, 1]]).astype(np.float32))
                pose = file[f"{camera}/pose"][:]
                extrinsics.append(pose[frame] if pose.ndim == 3 else pose)
        states = []
        for step in range(self.num_future + 1):
            now = min(times[frame] + step, times[-1])
            before = min(np.searchsorted(times, now, side="right") - 1, len(times) - 2)
            fraction = (now - times[before]) / (times[before + 1] - times[before])
            pair = slice(before, before + 2)
            pose = np.eye(4)
            pose[:3, :3] = Slerp([0.0, 1.0], Rotation.from_matrix(poses[pair, 0, :3, :3]))(fraction).as_matrix()
            pose[:3, 3] = (1 - fraction) * poses[before, 0, :3, 3] + fraction * poses[before + 1, 0, :3, 3]
            openness = (1 - fraction) * gripper[before] + fraction * gripper[before + 1]
            states.append(np.concatenate([pose.reshape(16), openness]).astype(np.float32))
        return {
            "obs_rgbs": np.stack(images)[None],
            "obs_masks": np.ones((1, len(images), *images[0].shape[1:]), bool),
            "obs_norm_xys": np.stack(maps)[None],
            "obs_extrinsics": np.stack(extrinsics)[None],
            "states": np.stack(states),
        }

    def _image(self, file: h5py.File, path: Path, camera: str, frame: int) -> np.ndarray:
        """(H, W, 3) uint8 RGB."""
        stored = file[f"{camera}/rgb"]
        if h5py.check_string_dtype(stored.dtype) is None:
            return cv2.cvtColor(cv2.imdecode(stored[frame], cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)
        import decord

        video = os.path.join(path.parent, stored.asstr()[frame])
        reader = decord.VideoReader(video, num_threads=1)
        seconds = file[f"{camera}/video_time"][:][frame]
        nearest = int(np.argmin(np.abs(reader.get_frame_timestamp(range(len(reader)))[:, 0] - seconds)))
        return reader[nearest].asnumpy()
