"""Read an episode file (HDF5, one per episode) with checks that name the file, the key and the frame.

Keys (``T`` frames, ``Nee`` end-effectors): ``ee_pose``, ``gripper``, ``timestamp``, optional ``*_desired``, and per
camera ``<camera>/rgb``, ``pose``, ``K`` and optional ``mask``; ``prompt_text*`` attributes hold paraphrases.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path

import cv2
import h5py
import numpy as np

from data_utils.errors import DataError

SCHEMA_VERSION = 1
# A JPEG's own channel order. "rgb": an ordinary JPEG, right colours in any viewer. "bgr": RGB arrays went through
# OpenCV's encoder unswapped, so red and blue are exchanged inside the file; files without the attribute are such.
JPEG_CHANNELS_ATTR = "jpeg_channels"
ROTATION_TOLERANCE = 1e-3


class Episode:
    """Read one episode file; the constructor checks the header only, arrays are checked when first read.

    Args:
        path: the HDF5 file.
        cameras: cameras that must be there; None: every group that has an ``rgb`` dataset.
    Raises:
        DataError: anything that is missing, has the wrong shape or type, or cannot be read; names file and key.
    """

    def __init__(self, path: str | os.PathLike, cameras: Sequence[str] | None = None) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise DataError(f"{self.path}: no such episode file; check the dataset's location")
        try:
            self._file = h5py.File(self.path, "r")
        except OSError as error:
            raise DataError(f"{self.path}: not a readable HDF5 file ({_one_line(error)}); record it again") from error
        try:
            with self._reading("header"):
                self._check_header(cameras)
        except BaseException:
            self._file.close()
            raise

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> "Episode":
        return self

    def __exit__(self, *exc) -> None:
        self.close()

    def __len__(self) -> int:
        return self.num_frames

    # -- header -------------------------------------------------------------------------------------------------

    def _check_header(self, cameras: Sequence[str] | None) -> None:
        self._arrays: dict[str, np.ndarray] = {}
        self._datasets: dict[str, h5py.Dataset] = {}
        self._sources: dict[str, str] = {}  # camera -> "jpeg", "raw" or "video"
        self._jpeg_shapes: dict[str, tuple[int, ...]] = {}
        self._attrs = dict(self._file.attrs)
        self._check_prompts()

        shape, _ = self._dataset("ee_pose", "f")
        if len(shape) not in (3, 4) or shape[-2:] != (4, 4):
            raise self._fault("ee_pose", f"has shape {shape}; wanted (T, Nee, 4, 4) or (T, 4, 4)")
        self.num_frames = shape[0]
        self.num_ee = shape[1] if len(shape) == 4 else 1
        if self.num_frames < 2:
            raise self._fault("ee_pose", f"has {self.num_frames} frame(s); an episode needs at least 2")
        if self.num_ee < 1:
            raise self._fault("ee_pose", "has no end-effector; wanted (T, Nee, 4, 4) with Nee >= 1")
        self._check_gripper("gripper")
        self._dataset("timestamp", "fiu", (self.num_frames,))

        self.has_desired = "ee_pose_desired" in self._file
        if self.has_desired != ("gripper_desired" in self._file):
            raise self._fault("ee_pose_desired", "and gripper_desired must both be there or both be absent")
        if self.has_desired:
            self._dataset("ee_pose_desired", "f", shape)
            self._check_gripper("gripper_desired")
        self._check_subtasks()

        if cameras is None:
            cameras = [name for name, item in self._file.items() if isinstance(item, h5py.Group) and "rgb" in item]
        self.cameras = tuple(cameras)
        for camera in self.cameras:
            self._check_camera(camera)

    def _check_gripper(self, key: str) -> None:
        shape, _ = self._dataset(key, "fiu")
        allowed = [(self.num_frames, self.num_ee)] + ([(self.num_frames,)] if self.num_ee == 1 else [])
        if shape not in allowed:
            raise self._fault(key, f"has shape {shape}; wanted {allowed[0]} to agree with ee_pose")

    def _check_prompts(self) -> None:
        self.prompts: list[str] = []
        for name in sorted(name for name in self._attrs if isinstance(name, str) and "prompt_text" in name):
            for value in np.atleast_1d(self._attrs[name]).tolist():
                text = value.decode("utf-8", "replace") if isinstance(value, bytes) else value
                if not isinstance(text, str) or not text.strip():
                    raise self._fault(f"attribute {name}", "is not a text; store the task as a non-empty string")
                self.prompts.append(text.strip())
        if not self.prompts:
            raise self._fault("attribute prompt_text", "is missing; store the task's instruction as a string")

    def _check_subtasks(self) -> None:
        self._subtasks: list[tuple[int, str]] = []
        if "subtask_description" not in self._file:
            return
        shape, dtype = self._dataset("subtask_description")
        if h5py.check_string_dtype(dtype) is None:
            raise self._fault("subtask_description", f"holds {dtype}; wanted strings")
        self._dataset("subtask_start_index", "iu", shape)
        with self._reading("subtask_description"):
            texts = self._datasets["subtask_description"].asstr()[:].tolist()
            self._subtasks = sorted(zip(self._datasets["subtask_start_index"][:].tolist(), texts, strict=True))

    def _check_camera(self, camera: str) -> None:
        T, key = self.num_frames, f"{camera}/rgb"
        if camera not in self._file:
            groups = [name for name, item in self._file.items() if isinstance(item, h5py.Group)]
            raise self._fault(camera, f"camera is missing; the file has {', '.join(groups) or 'no cameras'}")
        shape, dtype = self._dataset(key)
        if not shape or shape[0] != T:
            raise self._fault(key, f"has shape {shape}; wanted {T} frames to agree with ee_pose")
        if h5py.check_vlen_dtype(dtype) == np.uint8 and len(shape) == 1:
            self._sources[camera] = "jpeg"
        elif dtype == np.uint8 and len(shape) == 4 and shape[1] == 3:
            self._sources[camera] = "raw"
        elif h5py.check_string_dtype(dtype) is not None:
            self._sources[camera] = "video"
        else:
            raise self._fault(
                key, f"has type {dtype} and shape {shape}; wanted (T,) JPEGs, (T, 3, H, W) uint8 or video paths"
            )
        shape, _ = self._dataset(f"{camera}/pose", "f")
        if shape not in ((T, 4, 4), (4, 4)):
            raise self._fault(f"{camera}/pose", f"has shape {shape}; wanted ({T}, 4, 4) or (4, 4)")
        shape, _ = self._dataset(f"{camera}/K", "f")
        if shape not in ((T, 3, 3), (3, 3)):
            raise self._fault(f"{camera}/K", f"has shape {shape}; wanted (3, 3) or ({T}, 3, 3)")
        if f"{camera}/mask" in self._file:
            shape, _ = self._dataset(f"{camera}/mask", "bu")
            if len(shape) != 3 or shape[0] != T:
                raise self._fault(f"{camera}/mask", f"has shape {shape}; wanted ({T}, H, W)")

    def _dataset(self, key: str, kinds: str | None = None, shape: tuple | None = None) -> tuple[tuple, np.dtype]:
        """Open and keep the dataset ``key``; returns its shape and type, both checked where given."""
        try:
            # The low-level call takes half the time of file[key], which matters for a hundred thousand headers.
            handle = h5py.h5d.open(self._file.id, key.encode())
        except (KeyError, ValueError) as error:
            raise self._fault(key, "is missing or not an array; every such file needs it") from error
        except (OSError, RuntimeError) as error:
            raise self._fault(key, f"cannot be read ({_one_line(error)}); the file is damaged") from error
        with self._reading(key):
            found, dtype = handle.shape, handle.dtype
        if kinds is not None and dtype.kind not in kinds:
            raise self._fault(key, f"has type {dtype}; wanted {'floats' if kinds == 'f' else 'numbers'}")
        if shape is not None and found != shape:
            raise self._fault(key, f"has shape {found}; wanted {shape} to agree with ee_pose")
        self._datasets[key] = h5py.Dataset(handle)
        return found, dtype

    # -- small arrays, checked and kept -----------------------------------------------------------------------------

    @property
    def timestamps(self) -> np.ndarray:
        """(T,) float64 seconds, finite and not decreasing."""
        if "timestamp" not in self._arrays:
            with self._reading("timestamp"):
                times = self._datasets["timestamp"][:].astype(np.float64)
            bad = ~np.isfinite(times)
            bad[1:] |= np.diff(times) < 0
            if bad.any():
                frame = int(np.argmax(bad))
                raise self._fault("timestamp", f"at frame {frame} is {times[frame]}; times must be finite and increase")
            if not times[-1] > times[0]:
                raise self._fault("timestamp", f"is {times[0]} at every frame; times must increase")
            self._arrays["timestamp"] = times
        return self._arrays["timestamp"]

    def times(self, record_dt: float | None = None) -> np.ndarray:
        """(T,) float64: ``t * record_dt`` where that is given, else the stored timestamps."""
        if record_dt is not None:
            return np.arange(self.num_frames) * record_dt
        return self.timestamps

    @property
    def world_from_ee(self) -> np.ndarray:
        """(T, Nee, 4, 4) float64."""
        return self._poses("ee_pose").reshape(self.num_frames, self.num_ee, 4, 4)

    @property
    def gripper(self) -> np.ndarray:
        """(T, Nee) float64 openness, 0 closed to 1 open."""
        return self._grippers("gripper")

    @property
    def world_from_ee_desired(self) -> np.ndarray | None:
        """(T, Nee, 4, 4) float64 commanded poses, None where the file has none."""
        if not self.has_desired:
            return None
        return self._poses("ee_pose_desired").reshape(self.num_frames, self.num_ee, 4, 4)

    @property
    def gripper_desired(self) -> np.ndarray | None:
        """(T, Nee) float64 commanded openness, None where the file has none."""
        return self._grippers("gripper_desired") if self.has_desired else None

    @property
    def ee_indices(self) -> tuple[int, ...] | None:
        """The file's own choice of end-effectors, None where it makes none."""
        if "ee_indices" not in self._attrs:
            return None
        indices = np.atleast_1d(self._attrs["ee_indices"])
        if (
            indices.dtype.kind not in "iu"
            or indices.size == 0
            or not (0 <= indices.min() <= indices.max() < self.num_ee)
        ):
            raise self._fault("attribute ee_indices", f"is {indices.tolist()}; wanted indices below {self.num_ee}")
        return tuple(indices.tolist())

    def prompt(self, rng: np.random.Generator | None = None, frame: int | None = None) -> str:
        """One of the paraphrases (the first without ``rng``), and the sub-task active at ``frame`` after it."""
        text = self.prompts[0] if rng is None else self.prompts[int(rng.integers(len(self.prompts)))]
        if frame is not None:
            active = [description for start, description in self._subtasks if start <= frame]
            if active:
                text = f"{text} {active[-1]}"
        return text

    def world_from_cam(self, camera: str, index: int) -> np.ndarray:
        """(4, 4) float64, OpenCV axes."""
        poses = self._poses(f"{camera}/pose")
        return poses[index] if poses.ndim == 3 else poses

    def K(self, camera: str, index: int) -> np.ndarray:
        """(3, 3) float64 pinhole intrinsics at the stored resolution."""
        key = f"{camera}/K"
        if key not in self._arrays:
            with self._reading(key):
                intrinsics = self._datasets[key][()].astype(np.float64)
            focal = intrinsics.reshape(-1, 9)[:, [0, 4]]
            bad = ~np.isfinite(intrinsics.reshape(-1, 9)).all(-1) | (focal <= 0).any(-1)
            if bad.any():
                raise self._fault(key, f"at frame {int(np.argmax(bad))} is not finite with positive focal lengths")
            self._arrays[key] = intrinsics
        intrinsics = self._arrays[key]
        return intrinsics[index] if intrinsics.ndim == 3 else intrinsics

    def mask(self, camera: str, index: int) -> np.ndarray | None:
        """(H, W) bool valid pixels, None where the file has no mask for this camera."""
        key = f"{camera}/mask"
        if key not in self._datasets:
            return None
        with self._reading(key, index):
            return self._datasets[key][index].astype(bool)

    # -- images -----------------------------------------------------------------------------------------------------

    def rgb(self, camera: str, index: int) -> np.ndarray:
        """(H, W, 3) uint8 RGB, C-contiguous."""
        key = f"{camera}/rgb"
        if camera not in self._sources:
            raise self._fault(camera, f"is not one of this episode's cameras {', '.join(self.cameras)}")
        if not 0 <= index < self.num_frames:
            raise self._fault(key, f"has no frame {index}; the episode has {self.num_frames}")
        source = self._sources[camera]
        if source == "video":
            raise self._fault(key, "is stored as video, which this reader does not decode; convert it to JPEG frames")
        with self._reading(key, index):
            data = self._datasets[key][index]
        if source == "raw":
            image = np.ascontiguousarray(data.transpose(1, 2, 0))
            return cv2.cvtColor(image, cv2.COLOR_BGR2RGB) if self._is_bgr else image
        return self._decode_jpeg(data, key, index)

    def _decode_jpeg(self, data: np.ndarray, key: str, index: int) -> np.ndarray:
        # libjpeg fills in what a cut file lacks with grey, so the end marker is checked here.
        if (
            data.size < 4
            or data[0] != 0xFF
            or data[1] != 0xD8
            or not data[-64:].tobytes().rstrip(b"\0").endswith(b"\xff\xd9")
        ):
            raise self._fault(
                key, f"at frame {index} is not a whole JPEG ({data.size} bytes); record the episode again"
            )
        try:
            image = cv2.imdecode(data, cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
        except cv2.error as error:
            raise self._fault(key, f"at frame {index} is not a decodable JPEG ({_one_line(error)})") from error
        if image is None:
            raise self._fault(key, f"at frame {index} is not a decodable JPEG; record the episode again")
        first = self._jpeg_shapes.setdefault(key, image.shape)
        if image.shape != first:
            raise self._fault(key, f"at frame {index} is {image.shape[:2]}, other frames are {first[:2]}")
        return cv2.cvtColor(image, cv2.COLOR_BGR2RGB) if self._swap_jpeg else image

    @property
    def _is_bgr(self) -> bool:
        return bool(self._attrs.get("is_bgr", False))

    @property
    def _swap_jpeg(self) -> bool:
        """Whether OpenCV's decoded array must have its channels exchanged to be RGB."""
        channels = self._attrs.get(JPEG_CHANNELS_ATTR)
        if channels is None:
            return self._is_bgr
        if channels not in ("rgb", "bgr"):
            raise self._fault(f"attribute {JPEG_CHANNELS_ATTR}", f"is {channels!r}; wanted 'rgb' or 'bgr'")
        return channels == "rgb"

    # -- helpers ----------------------------------------------------------------------------------------------------

    def _poses(self, key: str) -> np.ndarray:
        if key not in self._arrays:
            with self._reading(key):
                poses = self._datasets[key][()].astype(np.float64)
            fault = pose_fault(poses.reshape(-1, 4, 4))
            if fault is not None:
                frame = fault[0] // (self.num_ee if key.startswith("ee_pose") else 1)
                raise self._fault(key, f"at frame {frame} {fault[1]}")
            self._arrays[key] = poses
        return self._arrays[key]

    def _grippers(self, key: str) -> np.ndarray:
        if key not in self._arrays:
            with self._reading(key):
                gripper = self._datasets[key][()].astype(np.float64).reshape(self.num_frames, self.num_ee)
            if not np.isfinite(gripper).all():
                frame = int(np.argmin(np.isfinite(gripper).all(-1)))
                raise self._fault(key, f"at frame {frame} is not finite; wanted openness in [0, 1]")
            self._arrays[key] = gripper
        return self._arrays[key]

    def _fault(self, key: str, what: str) -> DataError:
        return DataError(f"{self.path}: {key.lstrip('/')} {what}")

    @contextlib.contextmanager
    def _reading(self, key: str, frame: int | None = None):
        """HDF5 reports damage with many exception types; all become one that names the place."""
        try:
            yield
        except DataError:
            raise
        except (OSError, RuntimeError, KeyError, ValueError, TypeError, MemoryError, OverflowError) as error:
            where = "" if frame is None else f" at frame {frame}"
            raise self._fault(key, f"cannot be read{where} ({_one_line(error)}); the file is damaged") from error


def pose_fault(poses: np.ndarray) -> tuple[int, str] | None:
    """Index and description of the first of (N, 4, 4) that is not a rigid transform, or None."""
    finite = np.isfinite(poses).all((-2, -1))
    if not finite.all():
        return int(np.argmin(finite)), "is not finite"
    rotation = poses[:, :3, :3]
    error = np.abs(rotation @ rotation.transpose(0, 2, 1) - np.eye(3)).max((-2, -1))
    good = (error <= ROTATION_TOLERANCE) & (np.linalg.det(rotation) > 0)
    good &= (np.abs(poses[:, 3] - (0.0, 0.0, 0.0, 1.0)) <= ROTATION_TOLERANCE).all(-1)
    if not good.all():
        return int(np.argmin(good)), "is not a rigid transform (its rotation part is not a rotation)"
    return None


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
