"""Read an episode file (HDF5, one per episode) with checks that name the file, the key, the frame and the rule.

Keys (``T`` frames, ``Nee`` end-effectors): ``ee_pose``, ``gripper``, ``timestamp``, optional ``*_desired``, and per
camera ``<camera>/rgb``, ``pose``, ``K`` and optional ``mask``, ``video_time``; ``prompt_text*`` attributes hold
paraphrases. Files of schema version 2 also carry checksums (``data_utils.schema``).
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import h5py
import numpy as np

from data_utils import schema
from data_utils.errors import DataError
from data_utils.h5frames import FrameDecoder, FrameError, JpegDecoder, RawDecoder
from data_utils.video import VideoCache

_UNSEALED = "record it again, or, if it was changed on purpose, renew its checksums (data_utils.h5io.seal)"


class Episode:
    """Read one episode file; the constructor checks the header only, arrays are checked when first read.

    Args:
        path: the HDF5 file.
        cameras: cameras that must be there; None: every group that has an ``rgb`` dataset.
        video_root: folder of the videos; None: what the file says, else the file's own folder.
        videos: open decoders shared with other episodes; None: decoders of its own.
        trusted: the file has been checked, with these cameras, and is unchanged; opening it anew checks its checksums
            alone, where it has any.
    Raises:
        DataError: anything that is missing, has the wrong shape or type, or cannot be read; names file and key.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        cameras: Sequence[str] | None = None,
        video_root: str | None = None,
        videos: VideoCache | None = None,
        trusted: bool = False,
    ) -> None:
        self.path = Path(path)
        self._trusted = trusted
        self._video_root = video_root
        self._videos = videos
        self._own_videos: VideoCache | None = None
        if not self.path.is_file():
            raise DataError(f"{self.path}: no such episode file; check the dataset's location", "file")
        try:
            self._file = h5py.File(self.path, "r")
        except OSError as error:
            what = f"not a readable HDF5 file ({_one_line(error)}); record it again"
            raise DataError(f"{self.path}: {what}", "file") from error
        try:
            with self._reading("header"):
                self._check_header(cameras)
        except BaseException:
            self._file.close()
            raise

    def close(self) -> None:
        # The file looks for every handle that is still open, which takes longer than to drop them.
        self._datasets.clear()
        self._readers.clear()
        self._file.close()
        if self._own_videos is not None:
            self._own_videos.close()

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
        self._decoders: dict[str, FrameDecoder] = {}
        self._readers: dict[str, Callable[[int], np.ndarray]] = {}
        self._is_video: dict[str, bool] = {}
        self._attrs = dict(self._file.attrs)
        self._check_version()
        self._check_prompts()
        if self._trusted and self._checksummed:
            self._take_header(tuple(cameras or ()))
            return

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

        self.has_desired = self._has("ee_pose_desired")
        if self.has_desired != self._has("gripper_desired"):
            raise self._fault("ee_pose_desired", "and gripper_desired must both be there or both be absent")
        if self.has_desired:
            self._dataset("ee_pose_desired", "f", shape)
            self._check_gripper("gripper_desired")
        if self._has("subtask_description"):
            shape, dtype = self._dataset("subtask_description")
            if h5py.check_string_dtype(dtype) is None:
                raise self._fault("subtask_description", f"holds {dtype}; wanted strings", "subtask")
            self._dataset("subtask_start_index", "iu", shape)

        if cameras is None:
            cameras = [name for name, item in self._file.items() if isinstance(item, h5py.Group) and "rgb" in item]
        self.cameras = tuple(cameras)
        for camera in self.cameras:
            self._check_camera(camera)

    def _take_header(self, cameras: tuple[str, ...]) -> None:
        """Open what the file was written with."""
        for key in self._checksums:
            group = key.rpartition("/")[0]
            if not group or group in cameras:
                self._datasets[key] = h5py.Dataset(h5py.h5d.open(self._file.id, key.encode()))
        shape = self._datasets["ee_pose"].shape
        self.num_frames, self.num_ee = shape[0], shape[1] if len(shape) == 4 else 1
        self.has_desired = "ee_pose_desired" in self._datasets
        self.cameras = cameras
        for camera in cameras:
            dtype = self._datasets[f"{camera}/rgb"].dtype
            self._is_video[camera] = h5py.check_string_dtype(dtype) is not None

    def _check_version(self) -> None:
        version = self._attrs.get(schema.VERSION_ATTR, 0)
        if not isinstance(version, int | np.integer) or not 0 <= version <= schema.SCHEMA_VERSION:
            what = f"is {version}; this library reads up to {schema.SCHEMA_VERSION}: update it, or record again"
            raise self._fault(f"attribute {schema.VERSION_ATTR}", what, "version")
        self._checksummed = version >= 2
        self._checksums: dict[str, int | None] = {}  # of every key the file was written with
        if self._checksummed:
            stored = self._attrs.get(schema.ATTRIBUTES_CHECKSUM_ATTR)
            if stored is None or int(stored) != schema.attributes_checksum(self._attrs):
                raise self._fault("attributes", f"are not what was written; {_UNSEALED}", "checksum")
            self._checksums = schema.parse_checksums(self._attrs[schema.CHECKSUMS_ATTR])

    def _has(self, key: str) -> bool:
        """Whether an optional key is there, or ought to be."""
        return key in self._checksums or key in self._file

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
                    raise self._fault(f"attribute {name}", "is not a text; store the task as a text", "prompt")
                self.prompts.append(text.strip())
        if not self.prompts:
            raise self._fault("attribute prompt_text", "is missing; store the task's instruction as a text", "prompt")

    def _check_camera(self, camera: str) -> None:
        T, key = self.num_frames, f"{camera}/rgb"
        if camera not in self._file:
            groups = [name for name, item in self._file.items() if isinstance(item, h5py.Group)]
            what = f"camera is missing; the file has {', '.join(groups) or 'no cameras'}"
            raise self._fault(camera, what, "camera")
        shape, dtype = self._dataset(key)
        if not shape or shape[0] != T:
            raise self._fault(key, f"has shape {shape}; wanted {T} frames to agree with ee_pose")
        self._is_video[camera] = is_video = h5py.check_string_dtype(dtype) is not None
        is_jpeg = h5py.check_vlen_dtype(dtype) == np.uint8 and len(shape) == 1
        is_raw = dtype == np.uint8 and len(shape) == 4 and shape[1] == 3
        if not (is_video or is_jpeg or is_raw):
            what = f"has type {dtype} and shape {shape}; wanted (T,) JPEGs, (T, 3, H, W) uint8 or video paths"
            raise self._fault(key, what)
        if is_video and self._has(f"{camera}/video_time"):
            self._dataset(f"{camera}/video_time", "f", (T,))
        if self._checksummed and not is_video:
            self._dataset(schema.FRAME_CHECKSUMS.format(key=key), "u", (T,))
        shape, _ = self._dataset(f"{camera}/pose", "f")
        if shape not in ((T, 4, 4), (4, 4)):
            raise self._fault(f"{camera}/pose", f"has shape {shape}; wanted ({T}, 4, 4) or (4, 4)")
        shape, _ = self._dataset(f"{camera}/K", "f")
        if shape not in ((T, 3, 3), (3, 3)):
            raise self._fault(f"{camera}/K", f"has shape {shape}; wanted (3, 3) or ({T}, 3, 3)")
        if self._has(f"{camera}/mask"):
            shape, _ = self._dataset(f"{camera}/mask", "bu")
            if len(shape) != 3 or shape[0] != T:
                raise self._fault(f"{camera}/mask", f"has shape {shape}; wanted ({T}, H, W)", "mask")
            if self._checksummed:
                self._dataset(schema.FRAME_CHECKSUMS.format(key=f"{camera}/mask"), "u", (T,))

    def _dataset(self, key: str, kinds: str | None = None, shape: tuple | None = None) -> tuple[tuple, np.dtype]:
        """Open and keep the dataset ``key``; returns its shape and type, both checked where given."""
        try:
            # The low-level call takes half the time of file[key], which matters for a hundred thousand headers.
            handle = h5py.h5d.open(self._file.id, key.encode())
        except (KeyError, ValueError) as error:
            raise self._fault(key, "is missing or not an array; every such file needs it") from error
        except (OSError, RuntimeError) as error:
            what = f"cannot be read ({_one_line(error)}); the file is damaged"
            raise self._fault(key, what, "file") from error
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
            times = self._array("timestamp").astype(np.float64)
            bad = ~np.isfinite(times)
            bad[1:] |= np.diff(times) < 0
            if bad.any():
                frame = int(np.argmax(bad))
                what = f"at frame {frame} is {times[frame]}; times must be finite and increase"
                raise self._fault("timestamp", what, "time")
            if not times[-1] > times[0]:
                raise self._fault("timestamp", f"is {times[0]} at every frame; times must increase", "time")
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
            what = f"is {indices.tolist()}; wanted indices below {self.num_ee}"
            raise self._fault("attribute ee_indices", what, "arms")
        return tuple(indices.tolist())

    @property
    def attributes(self) -> dict:
        """The file's attributes as they are stored."""
        return dict(self._attrs)

    @property
    def subtasks(self) -> list[tuple[int, str]]:
        """First frame and text of each sub-task, in order; empty where the file has none."""
        if "subtask_description" not in self._datasets:
            return []
        if "subtask_description" not in self._arrays:
            texts = self._array("subtask_description")
            starts = self._array("subtask_start_index")
            if starts.size and not 0 <= starts.min() <= starts.max() < self.num_frames:
                what = f"is {starts.tolist()}; wanted frames below {self.num_frames}"
                raise self._fault("subtask_start_index", what, "subtask")
            order = np.argsort(starts, kind="stable")
            self._arrays["subtask_start_index"], self._arrays["subtask_description"] = starts[order], texts[order]
        starts, texts = self._arrays["subtask_start_index"], self._arrays["subtask_description"]
        return list(zip(starts.tolist(), texts.tolist(), strict=True))

    def prompt(self, rng: np.random.Generator | None = None, frame: int | None = None) -> str:
        """One of the paraphrases (the first without ``rng``), and the sub-task active at ``frame`` after it."""
        text = self.prompts[0] if rng is None else self.prompts[int(rng.integers(len(self.prompts)))]
        if frame is not None:
            active = [description for start, description in self.subtasks if start <= frame]
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
            intrinsics = self._array(key).astype(np.float64)
            fault = None if self._trusted else schema.intrinsics_fault(intrinsics.reshape(-1, 3, 3))
            if fault is not None:
                raise self._fault(key, f"at frame {fault[0]} {fault[1]}", "intrinsics")
            self._arrays[key] = intrinsics
        intrinsics = self._arrays[key]
        return intrinsics[index] if intrinsics.ndim == 3 else intrinsics

    # -- frames -----------------------------------------------------------------------------------------------------

    def rgb(self, camera: str, index: int) -> np.ndarray:
        """Frame ``index`` of ``camera``: (H, W, 3) uint8 RGB, whichever way it is stored."""
        key = f"{camera}/rgb"
        self._check_index(key, index)
        if self.is_video(camera):
            path, time = self.video_location(camera, index)
            try:
                return self._video_cache().frame(path, time)
            except DataError as error:  # names the video
                raise self._fault(key, f"at frame {index}: {error}", error.rule) from error
        data = self._stored_frame(key, index)
        try:
            return self._decoder(camera).decode(data)
        except FrameError as error:
            raise self._fault(key, f"at frame {index} {error}", "image") from error

    def is_video(self, camera: str) -> bool:
        """Whether the frames of ``camera`` stay in video files."""
        return self._is_video[camera]

    def video_location(self, camera: str, index: int) -> tuple[str, float]:
        """The video file of a frame, and the seconds in it: ``video_time``, or the timestamp where there is none."""
        paths, times = self._video_frames(camera)
        root = self._video_root
        if root is None:
            root = os.path.join(self.path.parent, str(self._attrs.get(schema.VIDEO_ROOT_ATTR, "")))
        return os.path.join(root, paths[index]), float(times[index])

    def mask(self, camera: str, index: int) -> np.ndarray | None:
        """(H, W) bool valid pixels, None where the file has no mask for this camera."""
        key = f"{camera}/mask"
        if key not in self._datasets:
            return None
        self._check_index(key, index)
        return self._stored_frame(key, index).astype(bool)

    def _decoder(self, camera: str) -> FrameDecoder:
        if camera not in self._decoders:
            is_bgr = bool(self._attrs.get("is_bgr", False))
            channels = self._attrs.get(schema.JPEG_CHANNELS_ATTR)
            if channels not in (None, "rgb", "bgr"):
                what = f"is {channels!r}; wanted 'rgb' or 'bgr'"
                raise self._fault(f"attribute {schema.JPEG_CHANNELS_ATTR}", what)
            if h5py.check_vlen_dtype(self._datasets[f"{camera}/rgb"].dtype) is None:
                self._decoders[camera] = RawDecoder(is_bgr)
            else:
                self._decoders[camera] = JpegDecoder(channels == "bgr" or (channels is None and not is_bgr))
        return self._decoders[camera]

    def _video_frames(self, camera: str) -> tuple[np.ndarray, np.ndarray]:
        """Path and time of every frame, (T,) each."""
        key, time_key = f"{camera}/rgb", f"{camera}/video_time"
        if key not in self._arrays:
            paths = self._array(key)
            times = self._array(time_key) if time_key in self._datasets else self.timestamps
            if not np.isfinite(times).all():
                raise self._fault(time_key, f"at frame {int(np.argmin(np.isfinite(times)))} is not finite", "time")
            self._arrays[key], self._arrays[time_key] = paths, times
        return self._arrays[key], self._arrays[time_key]

    def _video_cache(self) -> VideoCache:
        if self._videos is not None:
            return self._videos
        if self._own_videos is None:
            self._own_videos = VideoCache()
        return self._own_videos

    def _stored_frame(self, key: str, index: int) -> np.ndarray:
        with self._reading(key, index):
            data = self._frame_reader(key)(index)
        if self._checksummed:
            beside = schema.FRAME_CHECKSUMS.format(key=key)
            if beside not in self._arrays:
                self._arrays[beside] = self._array(beside)
            if int(self._arrays[beside][index]) != schema.array_checksum(data):
                raise self._fault(key, f"at frame {index} is not what was written; {_UNSEALED}", "checksum")
        return data

    def _frame_reader(self, key: str) -> Callable[[int], np.ndarray]:
        """Reads one item of a dataset; JPEGs by h5py's low-level calls, in a third of the time of ``dataset[i]``."""
        if key not in self._readers:
            dataset = self._datasets[key]
            is_jpeg = h5py.check_vlen_dtype(dataset.dtype) is not None
            self._readers[key] = _ItemReader(dataset) if is_jpeg else dataset.__getitem__
        return self._readers[key]

    def _check_index(self, key: str, index: int) -> None:
        if not 0 <= index < self.num_frames:
            raise self._fault(key, f"has no frame {index}; the episode has {self.num_frames}")

    # -- helpers ----------------------------------------------------------------------------------------------------

    def _array(self, key: str) -> np.ndarray:
        """A whole array as stored, compared with its checksum where the file has one; texts as (N,) objects."""
        dataset = self._datasets[key]
        with self._reading(key):
            dtype = dataset.dtype
            if dtype.kind in "fiub":
                # The low-level call takes a fifth of the time of dataset[()].
                array = np.empty(dataset.id.shape, dtype)
                dataset.id.read(h5py.h5s.ALL, h5py.h5s.ALL, array)
            else:
                array = (dataset.asstr() if h5py.check_string_dtype(dtype) is not None else dataset)[()]
        if self._checksummed and self._checksums.get(key) != schema.array_checksum(array):
            raise self._fault(key, f"is not what was written; {_UNSEALED}", "checksum")
        return array

    def _poses(self, key: str) -> np.ndarray:
        if key not in self._arrays:
            poses = self._array(key).astype(np.float64)
            fault = None if self._trusted else schema.pose_fault(poses.reshape(-1, 4, 4))
            if fault is not None:
                index, rule, what = fault
                frame = index // (self.num_ee if key.startswith("ee_pose") else 1)
                raise self._fault(key, f"at frame {frame} {what}", rule)
            self._arrays[key] = poses
        return self._arrays[key]

    def _grippers(self, key: str) -> np.ndarray:
        if key not in self._arrays:
            gripper = self._array(key).astype(np.float64).reshape(self.num_frames, self.num_ee)
            fault = None if self._trusted else schema.openness_fault(gripper)
            if fault is not None:
                raise self._fault(key, f"at frame {fault[0]} {fault[1]}", "gripper")
            self._arrays[key] = gripper
        return self._arrays[key]

    def _fault(self, key: str, what: str, rule: str = "schema") -> DataError:
        return DataError(f"{self.path}: {key.lstrip('/')} {what}", rule)

    @contextlib.contextmanager
    def _reading(self, key: str, frame: int | None = None):
        """HDF5 reports damage with many exception types; all become one that names the place."""
        try:
            yield
        except DataError:
            raise
        except (OSError, RuntimeError, KeyError, ValueError, TypeError, MemoryError, OverflowError) as error:
            where = "" if frame is None else f" at frame {frame}"
            what = f"cannot be read{where} ({_one_line(error)}); the file is damaged"
            raise self._fault(key, what, "file") from error


class _ItemReader:
    """Reads single items of a one-dimensional dataset, with the selection and type prepared once."""

    def __init__(self, dataset: h5py.Dataset) -> None:
        self._id, self._dtype = dataset.id, dataset.dtype
        self._space = self._id.get_space()
        self._one = h5py.h5s.create_simple((1,))
        self._type = h5py.h5t.py_create(self._dtype)
        self._lock = threading.Lock()  # between choosing the item and reading it

    def __call__(self, index: int) -> np.ndarray:
        out = np.empty(1, self._dtype)
        with self._lock:
            self._space.select_hyperslab((index,), (1,))
            self._id.read(self._one, self._space, out, self._type)
        return out[0]


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
