"""Write an episode file frame by frame; it appears under its name only when it is whole."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import cv2
import h5py
import numpy as np

from data_utils.errors import DataError
from data_utils.h5reader import JPEG_CHANNELS_ATTR, SCHEMA_VERSION, pose_fault


class EpisodeWriter:
    """Context manager that records one episode.

    Frames are checked as they are added (a refused frame changes nothing). On a clean exit the file is written to a
    temporary name in the same folder, flushed to disk and renamed; an exception, or :meth:`discard`, leaves nothing.

    Args:
        path: final name of the episode file; an existing one is replaced.
        cameras: names of the cameras every frame must bring.
        num_arms: Nee.
        prompts: the instruction, or several paraphrases of it.
        jpeg_quality: 1 to 100.
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
    ) -> None:
        self.path = Path(path)
        self._scalars: dict[str, list[np.ndarray]] = {"timestamp": [], "ee_pose": [], "gripper": []}
        self.cameras = tuple(cameras)
        self.num_arms = num_arms
        self.prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        self.jpeg_quality = jpeg_quality
        if not self.cameras or len(set(self.cameras)) != len(self.cameras):
            raise self._fault("cameras", f"are {self.cameras}; wanted at least one name, each once")
        if num_arms < 1:
            raise self._fault("num_arms", f"is {num_arms}; wanted at least 1")
        if not self.prompts or not all(isinstance(text, str) and text.strip() for text in self.prompts):
            raise self._fault("prompts", f"are {self.prompts!r}; wanted at least one non-empty text")
        if not 1 <= jpeg_quality <= 100:
            raise self._fault("jpeg_quality", f"is {jpeg_quality}; wanted 1 to 100")
        self._images: dict[str, list[np.ndarray]] = {camera: [] for camera in self.cameras}
        self._camera_poses: dict[str, list[np.ndarray]] = {camera: [] for camera in self.cameras}
        self._intrinsics: dict[str, list[np.ndarray]] = {camera: [] for camera in self.cameras}
        self._image_hw: dict[str, tuple[int, int]] = {}
        self._discarded = False

    def __len__(self) -> int:
        return len(self._scalars["timestamp"])

    def __enter__(self) -> "EpisodeWriter":
        if not self.path.parent.is_dir():
            raise self._fault("folder", f"{self.path.parent} does not exist; create it first")
        return self

    def __exit__(self, exc_type, exc, traceback) -> None:
        if exc_type is None and not self._discarded:
            self._write()

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
            raise self._fault("timestamp", f"is {timestamp}; wanted a finite time in seconds")
        if len(self) and not timestamp > self._scalars["timestamp"][-1]:
            raise self._fault("timestamp", f"is {timestamp}, not later than {self._scalars['timestamp'][-1]} before it")
        scalars = {
            "timestamp": np.float64(timestamp),
            "ee_pose": self._pose("ee_pose", world_from_ee, (self.num_arms, 4, 4)),
            "gripper": self._openness("gripper", gripper),
        }
        if (world_from_ee_desired is None) != (gripper_desired is None):
            raise self._fault("ee_pose_desired", "and gripper_desired must be given together")
        if world_from_ee_desired is not None:
            scalars["ee_pose_desired"] = self._pose("ee_pose_desired", world_from_ee_desired, (self.num_arms, 4, 4))
            scalars["gripper_desired"] = self._openness("gripper_desired", gripper_desired)
        if len(self) and scalars.keys() != self._scalars.keys():
            raise self._fault("ee_pose_desired", "must be given on every frame or on none")

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
                raise self._fault(f"{camera}/{name}", f"is missing; wanted one for each of {', '.join(self.cameras)}")
        image = np.asarray(images[camera])
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
            raise self._fault(f"{camera}/rgb", f"is {image.dtype} {image.shape}; wanted (H, W, 3) uint8 RGB")
        if image.shape[:2] != self._image_hw.get(camera, image.shape[:2]):
            raise self._fault(f"{camera}/rgb", f"is {image.shape[:2]}; earlier frames are {self._image_hw[camera]}")
        intrinsics = np.asarray(K[camera], np.float32)
        if intrinsics.shape != (3, 3) or not np.isfinite(intrinsics).all() or (np.diag(intrinsics)[:2] <= 0).any():
            raise self._fault(f"{camera}/K", "is not a finite (3, 3) matrix with positive focal lengths")
        pose = self._pose(f"{camera}/pose", world_from_cam[camera], (4, 4))
        # An ordinary JPEG: OpenCV's encoder takes BGR, and the file's attribute says so to every reader.
        bgr = cv2.cvtColor(np.ascontiguousarray(image), cv2.COLOR_RGB2BGR)
        done, jpeg = cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, self.jpeg_quality])
        if not done:
            raise self._fault(f"{camera}/rgb", f"of shape {image.shape} could not be encoded as JPEG")
        return jpeg.reshape(-1), image.shape[:2], pose, intrinsics

    def _pose(self, key: str, value: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        pose = np.asarray(value, np.float64)
        if pose.shape != shape:
            raise self._fault(key, f"has shape {pose.shape}; wanted {shape}")
        fault = pose_fault(pose.reshape(-1, 4, 4))
        if fault is not None:
            raise self._fault(key, fault[1])
        return pose.astype(np.float32)

    def _openness(self, key: str, value: np.ndarray) -> np.ndarray:
        gripper = np.asarray(value, np.float64)
        if gripper.shape != (self.num_arms,):
            raise self._fault(key, f"has shape {gripper.shape}; wanted ({self.num_arms},)")
        if not ((gripper >= -1e-3) & (gripper <= 1 + 1e-3)).all():
            raise self._fault(key, f"is {gripper.tolist()}; wanted openness in [0 closed, 1 open]")
        return gripper.clip(0, 1).astype(np.float32)

    def _write(self) -> None:
        if len(self) < 2:
            raise DataError(f"{self.path}: {len(self)} frame(s) recorded; an episode needs at least 2")
        temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")
        try:
            with h5py.File(temporary, "w") as file:
                self._fill(file)
            _fsync(temporary)
            os.replace(temporary, self.path)
            _fsync(self.path.parent)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise

    def _fill(self, file: h5py.File) -> None:
        file.attrs["schema_version"] = SCHEMA_VERSION
        file.attrs[JPEG_CHANNELS_ATTR] = "rgb"
        file.attrs["compress"] = True
        for number, text in enumerate(self.prompts):
            file.attrs["prompt_text" if number == 0 else f"prompt_text_{number}"] = text
        for key, values in self._scalars.items():
            file[key] = np.stack(values)
        for camera in self.cameras:
            group = file.create_group(camera)
            rgb = group.create_dataset("rgb", (len(self),), dtype=h5py.vlen_dtype(np.uint8))
            for index, jpeg in enumerate(self._images[camera]):
                rgb[index] = jpeg
            group["pose"] = np.stack(self._camera_poses[camera])
            intrinsics = np.stack(self._intrinsics[camera])
            group["K"] = intrinsics[0] if (intrinsics == intrinsics[0]).all() else intrinsics

    def _fault(self, key: str, what: str) -> DataError:
        return DataError(f"{self.path}: frame {len(self)}: {key} {what}")


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
