"""Write a whole episode as a file, which appears under its name when it is whole."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import h5py
import numpy as np

from data_utils.data_loc import EPISODE_SUFFIXES
from data_utils.episodes import schema
from data_utils.episodes.frames import FrameError, jpeg_size
from data_utils.errors import DataError
from data_utils.files import atomic_write
from data_utils.geometry.pinhole import Size, intrinsics_fault
from data_utils.prompts import check_prompts

WRITTEN_OPENNESS_TOLERANCE = 1e-3  # rounding; what is written is clipped


@dataclass
class VideoFrames:
    """Frames that stay in video files."""

    path: str | Sequence[str]  # relative to the episode's video root; one for all frames, or one per frame
    times: np.ndarray  # (T,) seconds in that video


@dataclass
class CameraData:
    """One camera of an episode."""

    world_from_cam: np.ndarray  # (T, 4, 4), or (4, 4) where it stands still; OpenCV axes
    K: np.ndarray  # (T, 3, 3) or (3, 3), at the resolution of the frames
    frames: Sequence[np.ndarray] | VideoFrames  # T of (H, W, 3) uint8 RGB, or of 1-D uint8 (an ordinary RGB JPEG)
    mask: np.ndarray | None = None  # (T, H, W) bool valid pixels


@dataclass
class EpisodeData:
    """A whole episode; lengths in metres, times in seconds, openness 0 closed to 1 open."""

    timestamp: np.ndarray  # (T,)
    world_from_ee: np.ndarray  # (T, Nee, 4, 4)
    gripper: np.ndarray  # (T, Nee)
    prompts: Sequence[str]  # the instruction and its paraphrases
    cameras: Mapping[str, CameraData]
    world_from_ee_desired: np.ndarray | None = None  # (T, Nee, 4, 4), commanded at each step
    gripper_desired: np.ndarray | None = None  # (T, Nee)
    subtasks: Sequence[tuple[int, str]] = ()  # first frame and text of each sub-task
    ee_indices: Sequence[int] | None = None  # which end-effectors are arms; None: as the dataset class says
    video_root: str | None = None  # absolute, or relative to the episode file's folder; None: that folder
    attributes: Mapping[str, str | int | float] = field(default_factory=dict)  # provenance


def check_name(path: Path) -> None:
    """Raise DataError for a name by which no episode is found again."""
    if path.suffix not in EPISODE_SUFFIXES:
        raise DataError(
            f"{path}: an episode file ends in {' or '.join(EPISODE_SUFFIXES)}; give it such a name", "location"
        )


def write_episode(path: str | os.PathLike, data: EpisodeData, jpeg_quality: int = 95) -> None:
    """Check an episode and write it (schema version 2); the file is there whole or not at all.

    Args:
        path: final name of the file, ``.h5`` or ``.hdf5``; an existing one is replaced.
        data: the episode.
        jpeg_quality: 1 to 100, of frames that are not encoded yet.
    Raises:
        DataError: what does not meet the format's rules, with key and frame.
    """
    path = Path(path)
    check_name(path)
    if not path.parent.is_dir():
        raise DataError(f"{path}: folder {path.parent} does not exist; create it first", "location")
    content = _Content(path, data, jpeg_quality)

    def write(temporary: Path) -> None:
        # The 1.10 format checksums HDF5's own structures, which older ones leave unprotected.
        with h5py.File(temporary, "w", libver=("v110", "v110")) as file:
            content.fill(file)

    atomic_write(path, write)


class _Content:
    """The checked arrays of an episode, as they are stored."""

    def __init__(self, path: Path, data: EpisodeData, jpeg_quality: int) -> None:
        self.path, self.jpeg_quality = path, jpeg_quality
        self.arrays: dict[str, np.ndarray] = {}
        self.texts: dict[str, list[str]] = {}
        self.frames: dict[str, list[np.ndarray]] = {}  # JPEGs
        self.num_frames = T = len(data.timestamp)
        if T < 2:
            raise self.fault("timestamp", f"has {T} frame(s); an episode needs at least 2", "schema")
        if not data.cameras:
            raise self.fault("cameras", "are none; wanted at least one", "camera")
        if not 1 <= jpeg_quality <= 100:
            raise ValueError(f"jpeg_quality is {jpeg_quality}; wanted 1 to 100")
        times = np.asarray(data.timestamp, np.float64)
        bad = ~np.isfinite(times)
        bad[1:] |= ~(np.diff(times) > 0)
        if times.shape != (T,) or bad.any():
            raise self.fault("timestamp", "must be (T,) finite and increasing", "time", int(np.argmax(bad)))
        self.arrays["timestamp"] = times

        shape = np.shape(data.world_from_ee)
        if len(shape) != 4 or shape[0] != T or shape[1] < 1 or shape[2:] != (4, 4):
            raise self.fault("ee_pose", f"has shape {shape}; wanted ({T}, Nee, 4, 4)", "schema")
        self.num_ee = shape[1]
        self.arrays["ee_pose"] = self.poses("ee_pose", data.world_from_ee, shape)
        self.arrays["gripper"] = self.openness("gripper", data.gripper)
        if (data.world_from_ee_desired is None) != (data.gripper_desired is None):
            raise self.fault("ee_pose_desired", "and gripper_desired must be given together", "schema")
        if data.world_from_ee_desired is not None:
            self.arrays["ee_pose_desired"] = self.poses("ee_pose_desired", data.world_from_ee_desired, shape)
            self.arrays["gripper_desired"] = self.openness("gripper_desired", data.gripper_desired)
        for name, camera in data.cameras.items():
            self.add_camera(name, camera)
        self.add_subtasks(data.subtasks)
        self.attributes = self.root_attributes(data)

    def root_attributes(self, data: EpisodeData) -> dict:
        try:
            check_prompts(data.prompts)
        except ValueError as error:
            raise self.fault("prompts", str(error), "prompt") from error
        attributes = {**data.attributes, schema.VERSION_ATTR: schema.SCHEMA_VERSION}
        attributes |= {schema.JPEG_CHANNELS_ATTR: "rgb", "compress": True}
        for number, text in enumerate(data.prompts):
            attributes["prompt_text" if number == 0 else f"prompt_text_{number}"] = text
        if data.ee_indices is not None:
            indices = [int(index) for index in data.ee_indices]
            if not indices or not all(0 <= index < self.num_ee for index in indices):
                raise self.fault("ee_indices", f"are {indices}; wanted indices below {self.num_ee}", "arms")
            attributes["ee_indices"] = np.array(indices, np.int64)
        if data.video_root is not None:
            attributes[schema.VIDEO_ROOT_ATTR] = data.video_root
        return attributes

    def add_camera(self, name: str, camera: CameraData) -> None:
        T, key = self.num_frames, f"{name}/rgb"
        if not name or "/" in name:
            raise self.fault(f"camera {name!r}", "is not a plain name", "camera")
        if isinstance(camera.frames, VideoFrames):
            paths = camera.frames.path
            self.texts[key] = [paths] * T if isinstance(paths, str) else list(paths)
            times = np.asarray(camera.frames.times, np.float64)
            if len(self.texts[key]) != T or times.shape != (T,) or not np.isfinite(times).all():
                raise self.fault(key, f"needs a video and a finite time for each of {T} frames", "video")
            self.arrays[f"{name}/video_time"] = times
        else:
            if len(camera.frames) != T:
                raise self.fault(key, f"has {len(camera.frames)} frames; wanted {T} to agree with timestamp", "schema")
            self.frames[key] = [self.jpeg(key, frame, index) for index, frame in enumerate(camera.frames)]
        shape = np.shape(camera.world_from_cam)
        if shape not in ((T, 4, 4), (4, 4)):
            raise self.fault(f"{name}/pose", f"has shape {shape}; wanted ({T}, 4, 4) or (4, 4)", "schema")
        self.arrays[f"{name}/pose"] = self.poses(f"{name}/pose", camera.world_from_cam, shape)
        hw = None if isinstance(camera.frames, VideoFrames) else self.size(key)
        self.arrays[f"{name}/K"] = self.intrinsics(f"{name}/K", camera.K, hw)
        if camera.mask is not None:
            mask = np.asarray(camera.mask)
            if mask.dtype != bool or mask.ndim != 3 or len(mask) != T:
                raise self.fault(f"{name}/mask", f"is {mask.dtype} {mask.shape}; wanted ({T}, H, W) bool", "mask")
            self.arrays[f"{name}/mask"] = mask

    def add_subtasks(self, subtasks: Sequence[tuple[int, str]]) -> None:
        for start, text in subtasks:
            if not 0 <= start < self.num_frames or not isinstance(text, str) or not text.strip():
                raise self.fault("subtasks", f"hold ({start}, {text!r}); wanted a frame and a text", "subtask")
        if subtasks:
            ordered = sorted(subtasks)
            self.texts["subtask_description"] = [text for _, text in ordered]
            self.arrays["subtask_start_index"] = np.array([start for start, _ in ordered], np.int64)

    # -- checks ---------------------------------------------------------------------------------------------------

    def poses(self, key: str, value: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        poses = np.asarray(value, np.float64)
        if poses.shape != shape:
            raise self.fault(key, f"has shape {poses.shape}; wanted {shape}", "schema")
        fault = schema.pose_fault(poses.reshape(-1, 4, 4))
        if fault is not None:
            index, rule, what = fault
            raise self.fault(key, what, rule, index // (self.num_ee if key.startswith("ee_pose") else 1))
        return poses.astype(np.float32)

    def openness(self, key: str, value: np.ndarray) -> np.ndarray:
        gripper = np.asarray(value, np.float64)
        if gripper.shape != (self.num_frames, self.num_ee):
            raise self.fault(key, f"has shape {gripper.shape}; wanted {(self.num_frames, self.num_ee)}", "schema")
        fault = schema.openness_fault(gripper, WRITTEN_OPENNESS_TOLERANCE)
        if fault is not None:
            raise self.fault(key, fault[1], "gripper", fault[0])
        return gripper.clip(0, 1).astype(np.float32)

    def intrinsics(self, key: str, value: np.ndarray, hw: Size | None) -> np.ndarray:
        K = np.asarray(value, np.float32)
        if K.shape not in ((self.num_frames, 3, 3), (3, 3)):
            raise self.fault(key, f"has shape {K.shape}; wanted (3, 3) or ({self.num_frames}, 3, 3)", "schema")
        fault = intrinsics_fault(K.reshape(-1, 3, 3), hw)
        if fault is not None:
            raise self.fault(key, fault[1], "intrinsics", fault[0])
        return K[0] if K.ndim == 3 and (K == K[0]).all() else K

    def size(self, key: str) -> Size:
        try:
            return jpeg_size(self.frames[key][0])
        except FrameError as error:
            raise self.fault(key, str(error), "image", 0) from error

    def jpeg(self, key: str, frame: np.ndarray, index: int) -> np.ndarray:
        frame = np.asarray(frame)
        if frame.ndim == 1 and frame.dtype == np.uint8:
            if frame[:2].tobytes() != b"\xff\xd8":
                raise self.fault(key, "is not a JPEG", "image", index)
            return frame
        return encode_jpeg(frame, self.jpeg_quality, lambda what: self.fault(key, what, "image", index))

    def fault(self, key: str, what: str, rule: str, frame: int | None = None) -> DataError:
        return DataError(f"{self.path}: {key}{'' if frame is None else f' at frame {frame}'} {what}", rule)

    # -- writing --------------------------------------------------------------------------------------------------

    def fill(self, file: h5py.File) -> None:
        for key, array in self.arrays.items():
            file[key] = array
        for key, texts in self.texts.items():
            file.create_dataset(key, data=texts, dtype=h5py.string_dtype())
        for key, frames in self.frames.items():
            dataset = file.create_dataset(key, (len(frames),), dtype=h5py.vlen_dtype(np.uint8))
            for index, jpeg in enumerate(frames):
                dataset[index] = jpeg
        for name, value in self.attributes.items():
            file.attrs[name] = value
        seal(file)


def seal(file: h5py.File) -> None:
    """Write the checksums of what ``file`` (open for writing) holds now.

    For files of schema version 2 that were changed on purpose; the reader refuses them otherwise.
    """
    datasets: dict[str, h5py.Dataset] = {}
    file.visititems(lambda key, item: datasets.update({key: item}) if isinstance(item, h5py.Dataset) else None)
    for key in [key for key in datasets if key.endswith(schema.FRAME_CHECKSUMS.format(key=""))]:
        del file[key], datasets[key]
    checksums: dict[str, int | None] = {}
    for key, dataset in datasets.items():
        is_text = h5py.check_string_dtype(dataset.dtype) is not None
        if key.endswith(("/rgb", "/mask")) and not is_text:
            beside = schema.FRAME_CHECKSUMS.format(key=key)
            file[beside] = per_frame = schema.frame_checksums(dataset)
            checksums |= {key: None, beside: schema.array_checksum(per_frame)}
        else:
            checksums[key] = schema.array_checksum(dataset.asstr()[()] if is_text else dataset[()])
    file.attrs[schema.CHECKSUMS_ATTR] = schema.format_checksums(checksums)
    file.attrs[schema.ATTRIBUTES_CHECKSUM_ATTR] = np.uint32(schema.attributes_checksum(dict(file.attrs)))


def encode_jpeg(image: np.ndarray, quality: int, fault: Callable[[str], DataError]) -> np.ndarray:
    """(H, W, 3) uint8 RGB to an ordinary JPEG, 1-D uint8; ``fault(what)`` makes the error of a wrong image."""
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise fault(f"is {image.dtype} {image.shape}; wanted (H, W, 3) uint8 RGB")
    # OpenCV's encoder takes BGR; the file's attribute says that the JPEG's own order is the usual one.
    bgr = cv2.cvtColor(np.ascontiguousarray(image), cv2.COLOR_RGB2BGR)
    done, jpeg = cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, quality])
    if not done:
        raise fault(f"of shape {image.shape} could not be encoded as JPEG")
    return jpeg.reshape(-1)
