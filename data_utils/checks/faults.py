"""Every fault of an episode file, by the rules of ``data_utils.errors.RULES``.

Training stops at the first fault of a file; here each part is read by itself, through the same accessors of
:class:`Episode`, so that what passes here is what training accepts. Beyond what training does, every frame is decoded
(``deep``), videos by PyAV, the one library that tells of damage.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence

import h5py
import numpy as np

from data_utils.episodes import schema
from data_utils.errors import DataError, Fault
from data_utils.geometry.pinhole import Size, intrinsics_fault
from data_utils.h5io import Episode
from data_utils.video import TOLERANCE, VideoCache
from data_utils.words import one_line

REPORTED_FRAMES = 5  # per rule and key; the rest is counted
OWN_KEYS = {
    *("ee_pose", "gripper", "ee_pose_desired", "gripper_desired", "timestamp"),
    *("subtask_description", "subtask_start_index"),
}


def find_faults(
    path: str | os.PathLike,
    cameras: Sequence[str] | None = None,
    video_root: str | None = None,
    videos: VideoCache | None = None,
    deep: bool = True,
    ee_indices: Sequence[int] | None = None,
    at: Callable[[str], object] | None = None,
) -> list[Fault]:
    """All faults of an episode file; none means that training can read every frame of it.

    A header fault outside the cameras makes the rest unreadable and is reported alone.

    Args:
        path: the file.
        cameras: cameras that must be there; those that the file has besides are checked too.
        video_root: folder of the videos; None: what the file says.
        videos: open decoders; None: PyAV's, of its own.
        deep: decode every frame; else the first, the middle and the last one of each camera.
        ee_indices: the end-effectors that a dataset class wants; None: any will do.
        at: told of every frame before it is read.
    """
    search = _Search(os.fspath(path), video_root, videos or VideoCache("pyav", max_open=2), deep, at)
    try:
        search.file(tuple(cameras or ()), ee_indices)
    finally:
        if videos is None:
            search.videos.close()
    return search.faults()


def frames_checked(num_frames: int, deep: bool) -> Sequence[int]:
    """Frames of each camera that are decoded."""
    return range(num_frames) if deep else sorted({0, num_frames // 2, num_frames - 1})


class _Search:
    """Collects the faults of one file."""

    def __init__(
        self,
        path: str,
        video_root: str | None,
        videos: VideoCache,
        deep: bool,
        at: Callable[[str], object] | None,
    ) -> None:
        self.path, self.video_root, self.videos, self.deep, self.at = path, video_root, videos, deep, at
        self._found: dict[tuple[str, str], list[str]] = {}  # (rule, key) -> messages, one per frame
        self._last: dict[tuple[str, str], int] = {}  # (rule, key) -> last faulty frame

    def faults(self) -> list[Fault]:
        out = []
        for (rule, key), messages in self._found.items():
            out += [Fault(rule, message) for message in messages[:REPORTED_FRAMES]]
            more = len(messages) - REPORTED_FRAMES
            if more > 0:
                out.append(Fault(rule, f"{key}: and {more} more frames, the last one {self._last[rule, key]}"))
        return out

    def add(self, key: str, rule: str, message: str, frame: int = 0) -> None:
        message = message.removeprefix(f"{self.path}: ")
        messages = self._found.setdefault((rule, key), [])
        if message not in messages[:REPORTED_FRAMES]:  # a wrong attribute is met again at every frame
            messages.append(message)
            self._last[rule, key] = frame

    def attempt(self, key: str, read: Callable[[], object], frame: int = 0):
        """What ``read`` returns; None, and a fault noted, where it cannot."""
        try:
            return read()
        except DataError as error:
            self.add(key, error.rule, str(error), frame)
            return None

    @contextlib.contextmanager
    def reading(self, key: str) -> Iterator[None]:
        """What HDF5 says of damage, in exceptions of many types, becomes a fault."""
        try:
            yield
        except (OSError, RuntimeError, KeyError, ValueError, TypeError, MemoryError, OverflowError) as error:
            what = f"cannot be read ({one_line(error)}); the file is damaged"
            self.add(key, "file", f"{key} {what}")

    # -- the parts of a file ----------------------------------------------------------------------------------------

    def file(self, cameras: Sequence[str], ee_indices: Sequence[int] | None) -> None:
        header = self.attempt("header", lambda: Episode(self.path, (), self.video_root, self.videos))
        if header is None:
            return
        with header, h5py.File(self.path, "r") as stored:
            self.times(header, stored)
            self.robot(header, stored)
            self.arms(header, ee_indices)
            self.subtasks(header)
            there = self.camera_names(stored)
            if not {*there, *cameras}:
                self.add(
                    "header", "camera", "there is no camera in the file; wanted a group <camera> with rgb, pose, K"
                )
            for camera in dict.fromkeys([*cameras, *there]):
                self.camera(camera, stored)
            self.other_checksums(header, stored, there)

    def camera_names(self, stored: h5py.File) -> list[str]:
        """Groups that are cameras; those that cannot be opened, which h5py passes over, are faults."""
        names = []
        with self.reading("header"):
            for name, item in stored.items():
                if item is None:
                    self.add(name, "file", f"{name} cannot be opened; the file is damaged")
                elif isinstance(item, h5py.Group) and "rgb" in item:
                    names.append(name)
        return names

    def times(self, header: Episode, stored: h5py.File) -> None:
        def every_frame(times: np.ndarray) -> Iterable[tuple[int, str, str]]:
            for frame in np.flatnonzero(~np.isfinite(times)):
                yield int(frame), "time", f"is {times[frame]}; times must be finite"
            for frame in np.flatnonzero(np.diff(times) < 0) + 1:
                yield int(frame), "time", f"is {times[frame]:g} s, after {times[frame - 1]:g} s; times must not go back"

        self.array("timestamp", lambda: header.timestamps, stored, every_frame)

    def robot(self, header: Episode, stored: h5py.File) -> None:
        self.array("ee_pose", lambda: header.world_from_ee, stored, _pose_faults)
        self.array("gripper", lambda: header.gripper, stored, _gripper_faults)
        if header.has_desired:
            self.array("ee_pose_desired", lambda: header.world_from_ee_desired, stored, _pose_faults)
            self.array("gripper_desired", lambda: header.gripper_desired, stored, _gripper_faults)

    def arms(self, header: Episode, wanted: Sequence[int] | None) -> None:
        own = self.attempt("ee_indices", lambda: header.ee_indices)
        if wanted is None or "ee_indices" in header.attributes and own is None:
            return
        chosen = wanted if own is None else own
        if len(chosen) > len(wanted):
            what = f"names {len(chosen)} end-effectors; the dataset class has {len(wanted)} arm(s)"
            self.add("ee_indices", "arms", f"attribute ee_indices {what}")
        if max(chosen) >= header.num_ee:
            what = f"has {header.num_ee} end-effector(s); the dataset class wants {list(chosen)}"
            self.add("ee_pose", "arms", f"ee_pose {what}")

    def subtasks(self, header: Episode) -> None:
        for number, (start, text) in enumerate(self.attempt("subtask_description", lambda: header.subtasks) or ()):
            if not text.strip():
                what = f"{number} (from frame {start}) has no text; write what is done, or remove it"
                self.add("subtask_description", "subtask", f"subtask_description {what}")

    def camera(self, camera: str, stored: h5py.File) -> None:
        view = self.attempt(f"{camera}/rgb", lambda: Episode(self.path, (camera,), self.video_root, self.videos))
        if view is None:
            return
        with view:
            self.array(f"{camera}/pose", lambda: view.world_from_cam(camera, 0), stored, _pose_faults)
            self.array(f"{camera}/K", lambda: view.K(camera, 0), stored, _intrinsics_faults)
            readable = self.covered(view, camera) if view.is_video(camera) else np.ones(len(view), bool)
            hw = self.frames(view, camera, readable)
            if hw is not None and ("intrinsics", f"{camera}/K") not in self._found:
                with self.reading(f"{camera}/K"):
                    for frame, rule, what in _intrinsics_faults(_raw(stored, f"{camera}/K"), hw):
                        self.add(f"{camera}/K", rule, f"{camera}/K at frame {frame} {what}", frame)

    def covered(self, view: Episode, camera: str) -> np.ndarray:
        """(T,) bool: frames whose video is there and reaches their time."""
        key, covered = f"{camera}/rgb", np.zeros(len(view), bool)
        if self.attempt(key, lambda: view.video_location(camera, 0)) is None:
            return covered
        locations = [view.video_location(camera, frame) for frame in range(len(view))]
        spans = {path: self.span(camera, path) for path in dict.fromkeys(path for path, _ in locations)}
        for frame, (path, time) in enumerate(locations):
            if spans[path] is None:
                continue
            first, last, interval = spans[path]
            covered[frame] = first - TOLERANCE * interval <= time <= last + TOLERANCE * interval
            if not covered[frame]:
                what = f"at frame {frame} is {time:.3f} s of {path}, which spans {first:.3f} to {last:.3f} s"
                self.add(key, "video", f"{key} {what}; is it the right video, whole?", frame)
        return covered

    def span(self, camera: str, path: str) -> tuple[float, float, float] | None:
        if self.at is not None:
            self.at(f"{camera} video {path}")
        return self.attempt(f"{camera}/rgb", lambda: self.videos.span(path))

    def frames(self, view: Episode, camera: str, readable: np.ndarray) -> Size | None:
        """Decode frames; all must have one size, and their masks too. Returns the size, None where no frame decodes."""
        key, mask_key, shape = f"{camera}/rgb", f"{camera}/mask", None
        for frame in frames_checked(len(view), self.deep):
            if self.at is not None:
                self.at(f"{camera} frame {frame}")
            if readable[frame]:
                image = self.attempt(key, lambda frame=frame: view.rgb(camera, frame), frame)
                if image is not None:
                    shape = shape or image.shape[:2]
                    if image.shape[:2] != shape:
                        what = f"at frame {frame} is {image.shape[:2]}, other frames are {shape}"
                        self.add(key, "image", f"{key} {what}", frame)
            mask = self.attempt(mask_key, lambda frame=frame: view.mask(camera, frame), frame)
            if mask is not None and shape is not None and mask.shape != shape:
                # All masks of a camera are one array.
                self.add(mask_key, "mask", f"{mask_key} is {mask.shape}, the images are {shape} (height, width)")
                break
        return shape

    def other_checksums(self, header: Episode, stored: h5py.File, cameras: Sequence[str]) -> None:
        """Arrays that training does not read, and arrays that are gone."""
        listed = header.attributes.get(schema.CHECKSUMS_ATTR)
        if listed is None:
            return
        for key, checksum in schema.parse_checksums(listed).items():
            group = key.split("/")[0]
            if key in OWN_KEYS or group in cameras or ("file", group) in self._found:
                continue
            with self.reading(key):
                gone = group if group not in stored else key
                if gone not in stored:
                    self.add(gone, "checksum", f"{gone} was written and is gone; record the episode again")
                elif checksum is not None and checksum != schema.array_checksum(_raw(stored, key)):
                    self.add(key, "checksum", f"{key} is not what was written; record the episode again")

    # -- arrays -----------------------------------------------------------------------------------------------------

    def array(
        self,
        key: str,
        read: Callable[[], object],
        stored: h5py.File,
        every_frame: Callable[[np.ndarray], Iterable[tuple[int, str, str]]],
    ) -> None:
        """Read an array by its accessor; where that refuses a frame, say which others are as bad.

        Args:
            every_frame: gives frame, rule and description of each bad frame of the array as stored.
        """
        try:
            read()
            return
        except DataError as error:
            first = error
        if first.rule == "checksum":  # says nothing about the values
            self.add(key, first.rule, str(first))
        elif first.rule == "file":
            return self.add(key, first.rule, str(first))
        faults = []
        with self.reading(key):
            faults = list(every_frame(_raw(stored, key)))
        for frame, rule, what in faults:
            self.add(key, rule, f"{key} at frame {frame} {what}", frame)
        if not faults:
            self.add(key, first.rule, str(first))


def _raw(stored: h5py.File, key: str) -> np.ndarray:
    """An array as stored, whatever its checksum."""
    dataset = stored[key]
    return (dataset.asstr() if h5py.check_string_dtype(dataset.dtype) is not None else dataset)[()]


def _pose_faults(poses: np.ndarray) -> Iterable[tuple[int, str, str]]:
    """Of (T, Nee, 4, 4), (T, 4, 4) or a fixed camera's (4, 4)."""
    by_frame = poses.astype(np.float64).reshape(len(poses) if poses.ndim > 2 else 1, -1, 4, 4)
    for frame, of_frame in enumerate(by_frame):
        fault = schema.pose_fault(of_frame)
        if fault is not None:
            index, rule, what = fault
            yield frame, rule, what if by_frame.shape[1] == 1 else f"{what}, end-effector {index}"


def _gripper_faults(gripper: np.ndarray) -> Iterable[tuple[int, str, str]]:
    for frame, of_frame in enumerate(gripper.astype(np.float64)):
        fault = schema.openness_fault(of_frame.reshape(1, -1))
        if fault is not None:
            yield frame, "gripper", fault[1]


def _intrinsics_faults(K: np.ndarray, hw: Size | None = None) -> Iterable[tuple[int, str, str]]:
    for frame, of_frame in enumerate(K.astype(np.float64).reshape(-1, 3, 3)):
        fault = intrinsics_fault(of_frame[None], hw)
        if fault is not None:
            yield frame, "intrinsics", fault[1]
