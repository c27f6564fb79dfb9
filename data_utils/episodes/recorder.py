"""Record an episode frame by frame: what a robot's or a simulator's loop calls."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from data_utils.episodes import schema
from data_utils.episodes.writer import (
    WRITTEN_OPENNESS_TOLERANCE,
    CameraData,
    EpisodeData,
    check_name,
    encode_jpeg,
    write_episode,
)
from data_utils.errors import DataError
from data_utils.geometry.pinhole import intrinsics_fault
from data_utils.prompts import check_prompts


class EpisodeWriter:
    """Context manager that records one episode frame by frame.

    Frames are checked as they are added (a refused frame changes nothing). On a clean exit the file is written by
    :func:`write_episode`; an exception, or :meth:`discard`, leaves nothing.

    Args:
        path: final name of the episode file, ``.h5`` or ``.hdf5``.
        cameras: names of the cameras every frame must bring.
        num_arms: Nee.
        prompts: the instruction, or several paraphrases of it.
        jpeg_quality: 1 to 100.
        overwrite: replace a file that is there; otherwise that is an error.
    Raises:
        DataError: a frame or an argument that does not meet the file's rules.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        cameras: Sequence[str],
        num_arms: int,
        prompts: str | Sequence[str],
        jpeg_quality: int = 95,
        overwrite: bool = False,
    ) -> None:
        self.path = Path(path)
        check_name(self.path)
        if self.path.exists() and not overwrite:
            what = "is there already; name another one, or give overwrite=True"
            raise DataError(f"{self.path}: {what}", "location")
        self._scalars: dict[str, list[np.ndarray]] = {"timestamp": []}
        self.cameras = tuple(cameras)
        self.num_arms = num_arms
        self.prompts = [prompts] if isinstance(prompts, (str, bytes)) else list(prompts or ())
        self.jpeg_quality = jpeg_quality
        if not self.cameras or len(set(self.cameras)) != len(self.cameras):
            raise self._fault("cameras", f"are {self.cameras}; wanted at least one name, each once", "camera")
        if num_arms < 1:
            raise self._fault("num_arms", f"is {num_arms}; wanted at least 1", "arms")
        try:
            check_prompts(self.prompts)
        except ValueError as error:
            raise self._fault("prompts", str(error), "prompt") from error
        if not 1 <= jpeg_quality <= 100:
            raise self._fault("jpeg_quality", f"is {jpeg_quality}; wanted 1 to 100", "image")
        self._images: dict[str, list[np.ndarray]] = {camera: [] for camera in self.cameras}
        self._camera_poses: dict[str, list[np.ndarray]] = {camera: [] for camera in self.cameras}
        self._intrinsics: dict[str, list[np.ndarray]] = {camera: [] for camera in self.cameras}
        self._image_hw: dict[str, tuple[int, int]] = {}
        self._discarded = False

    def __len__(self) -> int:
        return len(self._scalars["timestamp"])

    def __enter__(self) -> "EpisodeWriter":
        if not self.path.parent.is_dir():
            raise self._fault("folder", f"{self.path.parent} does not exist; create it first", "location")
        return self

    def __exit__(self, exc_type, exc, traceback) -> None:
        if exc_type is None and not self._discarded:
            write_episode(self.path, self._episode(), self.jpeg_quality)

    def discard(self) -> None:
        """Drop what was recorded: leaving the context writes nothing."""
        self._discarded = True

    def add_frame(
        self,
        timestamp: float,
        world_from_ee: np.ndarray,
        gripper: np.ndarray,
        images: Mapping[str, np.ndarray],
        world_from_cam: Mapping[str, np.ndarray],
        K: Mapping[str, np.ndarray],
        world_from_ee_desired: np.ndarray | None = None,
        gripper_desired: np.ndarray | None = None,
    ) -> None:
        """Append one frame.

        Args:
            timestamp: seconds, later than the frame before.
            world_from_ee: (Nee, 4, 4).
            gripper: (Nee,) openness, 0 closed to 1 open.
            images: camera -> (H, W, 3) uint8 RGB.
            world_from_cam: camera -> (4, 4), OpenCV axes.
            K: camera -> (3, 3), at the image's resolution.
            world_from_ee_desired: (Nee, 4, 4) commanded at this step; with ``gripper_desired``, on every frame or none.
            gripper_desired: (Nee,).
        Raises:
            DataError: names the frame and the key.
        """
        if not np.isfinite(timestamp):
            raise self._fault("timestamp", f"is {timestamp}; wanted a finite time in seconds", "time")
        if len(self) and not timestamp > self._scalars["timestamp"][-1]:
            before = self._scalars["timestamp"][-1]
            raise self._fault("timestamp", f"is {timestamp}, not later than {before} before it", "time")
        scalars = {
            "timestamp": np.float64(timestamp),
            "world_from_ee": self._pose("ee_pose", world_from_ee, (self.num_arms, 4, 4)),
            "gripper": self._openness("gripper", gripper),
        }
        if (world_from_ee_desired is None) != (gripper_desired is None):
            raise self._fault("ee_pose_desired", "and gripper_desired must be given together", "schema")
        if world_from_ee_desired is not None:
            shape = (self.num_arms, 4, 4)
            scalars["world_from_ee_desired"] = self._pose("ee_pose_desired", world_from_ee_desired, shape)
            scalars["gripper_desired"] = self._openness("gripper_desired", gripper_desired)
        if len(self) and scalars.keys() != self._scalars.keys():
            raise self._fault("ee_pose_desired", "must be given on every frame or on none", "schema")

        cameras = {camera: self._camera_frame(camera, images, world_from_cam, K) for camera in self.cameras}
        for key, value in scalars.items():
            self._scalars.setdefault(key, []).append(value)
        for camera, (jpeg, hw, pose, intrinsics) in cameras.items():
            self._images[camera].append(jpeg)
            self._image_hw[camera] = hw
            self._camera_poses[camera].append(pose)
            self._intrinsics[camera].append(intrinsics)

    def _camera_frame(self, camera: str, images: Mapping, world_from_cam: Mapping, K: Mapping) -> tuple:
        for name, values in (("rgb", images), ("pose", world_from_cam), ("K", K)):
            if camera not in values:
                wanted = ", ".join(self.cameras)
                raise self._fault(f"{camera}/{name}", f"is missing; wanted one for each of {wanted}", "camera")
        image = np.asarray(images[camera])
        jpeg = encode_jpeg(image, self.jpeg_quality, lambda what: self._fault(f"{camera}/rgb", what, "image"))
        if image.shape[:2] != self._image_hw.get(camera, image.shape[:2]):
            earlier = self._image_hw[camera]
            raise self._fault(f"{camera}/rgb", f"is {image.shape[:2]}; earlier frames are {earlier}", "image")
        intrinsics = np.asarray(K[camera], np.float32)
        if intrinsics.shape != (3, 3):
            raise self._fault(f"{camera}/K", f"has shape {intrinsics.shape}; wanted (3, 3)", "schema")
        fault = intrinsics_fault(intrinsics[None], image.shape[:2])
        if fault is not None:
            raise self._fault(f"{camera}/K", fault[1], "intrinsics")
        return jpeg, image.shape[:2], self._pose(f"{camera}/pose", world_from_cam[camera], (4, 4)), intrinsics

    def _pose(self, key: str, value: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        pose = np.asarray(value, np.float64)
        if pose.shape != shape:
            raise self._fault(key, f"has shape {pose.shape}; wanted {shape}", "schema")
        fault = schema.pose_fault(pose.reshape(-1, 4, 4))
        if fault is not None:
            raise self._fault(key, fault[2], fault[1])
        return pose.astype(np.float32)

    def _openness(self, key: str, value: np.ndarray) -> np.ndarray:
        gripper = np.asarray(value, np.float64)
        if gripper.shape != (self.num_arms,):
            raise self._fault(key, f"has shape {gripper.shape}; wanted ({self.num_arms},)", "schema")
        fault = schema.openness_fault(gripper[None], WRITTEN_OPENNESS_TOLERANCE)
        if fault is not None:
            raise self._fault(key, fault[1], "gripper")
        return gripper

    def _episode(self) -> EpisodeData:
        if len(self) < 2:
            raise DataError(f"{self.path}: {len(self)} frame(s) recorded; an episode needs at least 2", "schema")
        cameras = {
            camera: CameraData(
                np.stack(self._camera_poses[camera]), np.stack(self._intrinsics[camera]), self._images[camera]
            )
            for camera in self.cameras
        }
        scalars = {key: np.stack(values) for key, values in self._scalars.items()}
        return EpisodeData(prompts=self.prompts, cameras=cameras, **scalars)

    def _fault(self, key: str, what: str, rule: str) -> DataError:
        return DataError(f"{self.path}: frame {len(self)}: {key} {what}", rule)
