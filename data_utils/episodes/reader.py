"""Read an episode file (HDF5, one per episode) with checks that name the file, the key, the frame and the rule.

Keys (``T`` frames, ``Nee`` end-effectors): ``ee_pose``, ``gripper``, ``timestamp``, optional ``*_desired``, and per
camera ``<camera>/rgb``, ``pose``, ``K`` and optional ``mask``, ``video_time``; ``prompt_text*`` attributes hold
paraphrases. Files of schema version 2 also carry checksums (``data_utils.episodes.schema``).
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np

from data_utils.episodes import schema
from data_utils.episodes.file import CheckedFile, is_jpeg, is_text
from data_utils.episodes.frames import FrameDecoder, FrameError, JpegDecoder, RawDecoder
from data_utils.errors import DataError
from data_utils.geometry.camera import CameraFrame
from data_utils.geometry.pinhole import Size, intrinsics_fault
from data_utils.prompts import check_prompt
from data_utils.video import VideoCache


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
        self._h5 = CheckedFile(path)
        self.path = self._h5.path
        # Without checksums, nothing tells whether the file is still what was checked.
        self._trusted = trusted and self._h5.is_checksummed
        self._video_root = video_root
        self._videos = videos
        self._own_videos: VideoCache | None = None
        self._arrays: dict[str, np.ndarray] = {}
        self._decoders: dict[str, FrameDecoder] = {}
        self._fitting: set[str] = set()  # cameras whose K was found to be of their images' size
        self._is_video: dict[str, bool] = {}
        try:
            with self._h5.reading("header"):
                self._check_prompts()
                if self._trusted:
                    self._take_header(tuple(cameras or ()))
                else:
                    self._check_header(cameras)
        except BaseException:
            self._h5.close()
            raise

    def close(self) -> None:
        self._h5.close()
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
        shape, _ = self._h5.open("ee_pose", "f")
        if len(shape) not in (3, 4) or shape[-2:] != (4, 4):
            raise self._h5.fault("ee_pose", f"has shape {shape}; wanted (T, Nee, 4, 4) or (T, 4, 4)")
        self.num_frames = shape[0]
        self.num_ee = shape[1] if len(shape) == 4 else 1
        if self.num_frames < 2:
            raise self._h5.fault("ee_pose", f"has {self.num_frames} frame(s); an episode needs at least 2")
        if self.num_ee < 1:
            raise self._h5.fault("ee_pose", "has no end-effector; wanted (T, Nee, 4, 4) with Nee >= 1")
        self._check_gripper("gripper")
        self._h5.open("timestamp", "fiu", (self.num_frames,))

        self.has_desired = self._h5.has("ee_pose_desired")
        if self.has_desired != self._h5.has("gripper_desired"):
            raise self._h5.fault("ee_pose_desired", "and gripper_desired must both be there or both be absent")
        if self.has_desired:
            self._h5.open("ee_pose_desired", "f", shape)
            self._check_gripper("gripper_desired")
        if self._h5.has("subtask_description"):
            shape, dtype = self._h5.open("subtask_description")
            if not is_text(dtype):
                raise self._h5.fault("subtask_description", f"holds {dtype}; wanted strings", "subtask")
            self._h5.open("subtask_start_index", "iu", shape)

        if cameras is None:
            written = [key.removesuffix("/rgb") for key in self._h5.checksums if key.endswith("/rgb")]
            cameras = sorted({*written, *(name for name in self._h5.groups() if self._h5.has(f"{name}/rgb"))})
        self.cameras = tuple(cameras)
        for camera in self.cameras:
            self._check_camera(camera)

    def _take_header(self, cameras: tuple[str, ...]) -> None:
        """Open what the file was written with."""
        for key in self._h5.checksums:
            group = key.rpartition("/")[0]
            if not group or group in cameras:
                self._h5.open(key)
        shape = self._h5.shape("ee_pose")
        self.num_frames, self.num_ee = shape[0], shape[1] if len(shape) == 4 else 1
        self.has_desired = self._h5.is_open("ee_pose_desired")
        self.cameras = cameras
        self._is_video = {camera: is_text(self._h5.dtype(f"{camera}/rgb")) for camera in cameras}

    def _check_gripper(self, key: str) -> None:
        shape, _ = self._h5.open(key, "fiu")
        allowed = [(self.num_frames, self.num_ee)] + ([(self.num_frames,)] if self.num_ee == 1 else [])
        if shape not in allowed:
            raise self._h5.fault(key, f"has shape {shape}; wanted {allowed[0]} to agree with ee_pose")

    def _check_prompts(self) -> None:
        self.prompts: list[str] = []
        for name in sorted(name for name in self._h5.attributes if isinstance(name, str) and "prompt_text" in name):
            for value in np.atleast_1d(self._h5.attributes[name]).tolist():
                text = value.decode("utf-8", "replace") if isinstance(value, bytes) else value
                try:
                    check_prompt(text)
                except ValueError as error:
                    raise self._h5.fault(f"attribute {name}", str(error), "prompt") from error
                self.prompts.append(text.strip())
        if not self.prompts:
            raise self._h5.fault(
                "attribute prompt_text", "is missing; store the task's instruction as a text", "prompt"
            )

    def _check_camera(self, camera: str) -> None:
        T, key = self.num_frames, f"{camera}/rgb"
        if not self._h5.has(camera):
            what = f"camera is missing; the file has {', '.join(self._h5.groups()) or 'no cameras'}"
            raise self._h5.fault(camera, what, "camera")
        shape, dtype = self._h5.open(key)
        if not shape or shape[0] != T:
            raise self._h5.fault(key, f"has shape {shape}; wanted {T} frames to agree with ee_pose")
        self._is_video[camera] = is_video = is_text(dtype)
        is_raw = dtype == np.uint8 and len(shape) == 4 and shape[1] == 3
        if not (is_video or is_raw or (is_jpeg(dtype) and len(shape) == 1)):
            what = f"has type {dtype} and shape {shape}; wanted (T,) JPEGs, (T, 3, H, W) uint8 or video paths"
            raise self._h5.fault(key, what)
        if is_video and self._h5.has(f"{camera}/video_time"):
            self._h5.open(f"{camera}/video_time", "f", (T,))
        if self._h5.is_checksummed and not is_video:
            self._h5.open(schema.FRAME_CHECKSUMS.format(key=key), "u", (T,))
        shape, _ = self._h5.open(f"{camera}/pose", "f")
        if shape not in ((T, 4, 4), (4, 4)):
            raise self._h5.fault(f"{camera}/pose", f"has shape {shape}; wanted ({T}, 4, 4) or (4, 4)")
        shape, _ = self._h5.open(f"{camera}/K", "f")
        if shape not in ((T, 3, 3), (3, 3)):
            raise self._h5.fault(f"{camera}/K", f"has shape {shape}; wanted (3, 3) or ({T}, 3, 3)")
        if self._h5.has(f"{camera}/mask"):
            shape, _ = self._h5.open(f"{camera}/mask", "bu")
            if len(shape) != 3 or shape[0] != T:
                raise self._h5.fault(f"{camera}/mask", f"has shape {shape}; wanted ({T}, H, W)", "mask")
            if self._h5.is_checksummed:
                self._h5.open(schema.FRAME_CHECKSUMS.format(key=f"{camera}/mask"), "u", (T,))

    # -- small arrays, checked and kept -----------------------------------------------------------------------------

    @property
    def timestamps(self) -> np.ndarray:
        """(T,) float64 seconds, finite and not decreasing."""
        if "timestamp" not in self._arrays:
            times = self._h5.array("timestamp").astype(np.float64)
            bad = ~np.isfinite(times)
            bad[1:] |= np.diff(times) < 0
            if bad.any():
                frame = int(np.argmax(bad))
                what = f"at frame {frame} is {times[frame]}; times must be finite and increase"
                raise self._h5.fault("timestamp", what, "time")
            if not times[-1] > times[0]:
                raise self._h5.fault("timestamp", f"is {times[0]} at every frame; times must increase", "time")
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
    def arms(self) -> tuple[int, ...]:
        """The end-effectors that are arms: the file's own choice, else all."""
        return self.ee_indices or tuple(range(self.num_ee))

    @property
    def ee_indices(self) -> tuple[int, ...] | None:
        """The file's own choice of end-effectors, None where it makes none."""
        if "ee_indices" not in self._h5.attributes:
            return None
        indices = np.atleast_1d(self._h5.attributes["ee_indices"])
        if (
            indices.dtype.kind not in "iu"
            or indices.size == 0
            or not (0 <= indices.min() <= indices.max() < self.num_ee)
        ):
            what = f"is {indices.tolist()}; wanted indices below {self.num_ee}"
            raise self._h5.fault("attribute ee_indices", what, "arms")
        return tuple(indices.tolist())

    @property
    def attributes(self) -> dict:
        """The file's attributes as they are stored."""
        return dict(self._h5.attributes)

    @property
    def subtasks(self) -> list[tuple[int, str]]:
        """First frame and text of each sub-task, in order; empty where the file has none."""
        if not self._h5.is_open("subtask_description"):
            return []
        if "subtask_description" not in self._arrays:
            texts = self._h5.array("subtask_description")
            starts = self._h5.array("subtask_start_index")
            if starts.size and not 0 <= starts.min() <= starts.max() < self.num_frames:
                what = f"is {starts.tolist()}; wanted frames below {self.num_frames}"
                raise self._h5.fault("subtask_start_index", what, "subtask")
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
            intrinsics = self._h5.array(key).astype(np.float64)
            self._arrays[key] = intrinsics
            if not self._trusted:
                self._check_intrinsics(camera)
        intrinsics = self._arrays[key]
        return intrinsics[index] if intrinsics.ndim == 3 else intrinsics

    def _check_intrinsics(self, camera: str, hw: Size | None = None) -> None:
        key = f"{camera}/K"
        fault = intrinsics_fault(self._arrays[key].reshape(-1, 3, 3), hw)
        if fault is not None:
            del self._arrays[key]
            raise self._h5.fault(key, f"at frame {fault[0]} {fault[1]}", "intrinsics")

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
                raise self._h5.fault(key, f"at frame {index}: {error}", error.rule) from error
        data = self._h5.item(key, index)
        try:
            return self._decoder(camera).decode(data)
        except FrameError as error:
            raise self._h5.fault(key, f"at frame {index} {error}", "image") from error

    def camera_frame(self, camera: str, index: int) -> CameraFrame:
        """Frame ``index`` of ``camera`` and where it was taken from; K is checked against the decoded size."""
        rgb, K = self.rgb(camera, index), self.K(camera, index)
        if camera not in self._fitting:
            self._check_intrinsics(camera, rgb.shape[:2])
            self._fitting.add(camera)
        return CameraFrame(rgb, K, self.world_from_cam(camera, index), self.mask(camera, index))

    def is_video(self, camera: str) -> bool:
        """Whether the frames of ``camera`` stay in video files."""
        return self._is_video[camera]

    def video_location(self, camera: str, index: int) -> tuple[str, float]:
        """The video file of a frame, and the seconds in it: ``video_time``, or the timestamp where there is none."""
        paths, times = self._video_frames(camera)
        root = self._video_root
        if root is None:
            root = os.path.join(self.path.parent, str(self._h5.attributes.get(schema.VIDEO_ROOT_ATTR, "")))
        return os.path.join(root, paths[index]), float(times[index])

    def mask(self, camera: str, index: int) -> np.ndarray | None:
        """(H, W) bool valid pixels, None where the file has no mask for this camera."""
        key = f"{camera}/mask"
        if not self._h5.is_open(key):
            return None
        self._check_index(key, index)
        return self._h5.item(key, index).astype(bool)

    def _decoder(self, camera: str) -> FrameDecoder:
        if camera not in self._decoders:
            is_bgr = bool(self._h5.attributes.get("is_bgr", False))
            channels = self._h5.attributes.get(schema.JPEG_CHANNELS_ATTR)
            if channels not in (None, "rgb", "bgr"):
                what = f"is {channels!r}; wanted 'rgb' or 'bgr'"
                raise self._h5.fault(f"attribute {schema.JPEG_CHANNELS_ATTR}", what)
            if is_jpeg(self._h5.dtype(f"{camera}/rgb")):
                self._decoders[camera] = JpegDecoder(channels == "bgr" or (channels is None and not is_bgr))
            else:
                self._decoders[camera] = RawDecoder(is_bgr)
        return self._decoders[camera]

    def _video_frames(self, camera: str) -> tuple[np.ndarray, np.ndarray]:
        """Path and time of every frame, (T,) each."""
        key, time_key = f"{camera}/rgb", f"{camera}/video_time"
        if key not in self._arrays:
            paths = self._h5.array(key)
            times = self._h5.array(time_key) if self._h5.is_open(time_key) else self.timestamps
            if not np.isfinite(times).all():
                raise self._h5.fault(time_key, f"at frame {int(np.argmin(np.isfinite(times)))} is not finite", "time")
            self._arrays[key], self._arrays[time_key] = paths, times
        return self._arrays[key], self._arrays[time_key]

    def _video_cache(self) -> VideoCache:
        if self._videos is not None:
            return self._videos
        if self._own_videos is None:
            self._own_videos = VideoCache()
        return self._own_videos

    def _check_index(self, key: str, index: int) -> None:
        if not 0 <= index < self.num_frames:
            raise self._h5.fault(key, f"has no frame {index}; the episode has {self.num_frames}")

    def _poses(self, key: str) -> np.ndarray:
        if key not in self._arrays:
            poses = self._h5.array(key).astype(np.float64)
            fault = None if self._trusted else schema.pose_fault(poses.reshape(-1, 4, 4))
            if fault is not None:
                index, rule, what = fault
                frame = index // (self.num_ee if key.startswith("ee_pose") else 1)
                raise self._h5.fault(key, f"at frame {frame} {what}", rule)
            self._arrays[key] = poses
        return self._arrays[key]

    def _grippers(self, key: str) -> np.ndarray:
        if key not in self._arrays:
            gripper = self._h5.array(key).astype(np.float64).reshape(self.num_frames, self.num_ee)
            fault = None if self._trusted else schema.openness_fault(gripper)
            if fault is not None:
                raise self._h5.fault(key, f"at frame {fault[0]} {fault[1]}", "gripper")
            self._arrays[key] = gripper
        return self._arrays[key]
