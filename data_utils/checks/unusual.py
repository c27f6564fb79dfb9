"""What an episode may hold by the rules, but hardly on purpose: warnings, each with the mistake that leads to it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator

import numpy as np

from data_utils.checks.visibility import camera_poses, frames_in_image, is_moving
from data_utils.errors import DataError, Fault
from data_utils.h5io import Episode
from data_utils.video import VideoCache
from data_utils.video.index import read_index
from data_utils.video.readers import DecordReader
from data_utils.words import counted

FAR = 100.0  # metres
GAP = 10.0  # times the median step
SEEN = 0.05  # of the frames: what at least one fixed camera sees of an end-effector that is where its pose says


def find_warnings(path: str | os.PathLike, videos: VideoCache, video_root: str | None = None) -> list[Fault]:
    """Unusual things in a file without faults; rules are those that they almost break.

    Raises:
        DataError: the file has faults.
    """
    with Episode(path, None, video_root, videos) as episode:
        shapes = {camera: episode.rgb(camera, 0).shape[:2] for camera in episode.cameras}
        return [
            *_prompts(episode),
            *_distances(episode),
            *_gripper(episode),
            *_times(episode),
            *_principal_points(episode, shapes),
            *_visibility(episode, shapes),
            *_videos(episode),
        ]


def _prompts(episode: Episode) -> Iterator[Fault]:
    for text in episode.prompts:
        if "_" in text and not re.search(r"\s", text):
            what = f"{text!r} looks like a file name; write it as a person would say it"
            yield Fault("prompt", f"prompt {what}")


def _distances(episode: Episode) -> Iterator[Fault]:
    origins = {"ee_pose": episode.world_from_ee[..., :3, 3]}
    for camera in episode.cameras:
        origins[f"{camera}/pose"] = camera_poses(episode, camera)[:, :3, 3]
    for key, positions in origins.items():
        far = float(np.abs(positions).max())
        if far > FAR:
            yield Fault("pose", f"{key} reaches {far:.0f} m from the world's origin; is it in millimetres?")


def _gripper(episode: Episode) -> Iterator[Fault]:
    for arm in range(episode.num_ee):
        openness = episode.gripper[:, arm]
        if np.ptp(openness) == 0:
            which = "" if episode.num_ee == 1 else f" of end-effector {arm}"
            yield Fault("gripper", f"gripper{which} is {openness[0]:g} in every frame; is its reading connected?")


def _times(episode: Episode) -> Iterator[Fault]:
    steps = np.diff(episode.timestamps)
    median = float(np.median(steps))
    gaps = np.flatnonzero(steps > GAP * median) if median > 0 else np.flatnonzero(steps < 0)
    if len(gaps):
        first = int(gaps[0])
        which = f"timestamp has {counted(len(gaps), 'gap')}, the first of {steps[first]:g} s after frame {first}"
        yield Fault("time", f"{which}, where {median:g} s is usual; were frames lost?")


def _principal_points(episode: Episode, shapes: dict[str, tuple[int, int]]) -> Iterator[Fault]:
    for camera, (height, width) in shapes.items():
        K = episode.K(camera, 0)
        x, y = K[0, 2], K[1, 2]
        if not (0 <= x <= width and 0 <= y <= height):
            where = f"({x:.0f}, {y:.0f}) is outside the image of {width} x {height}"
            yield Fault("intrinsics", f"{camera}/K: principal point {where}; does K belong to the stored size?")


def _visibility(episode: Episode, shapes: dict[str, tuple[int, int]]) -> Iterator[Fault]:
    """Arms that the fixed cameras hardly ever see, or, where every camera moves, that none ever sees."""
    fixed = [camera for camera in shapes if not is_moving(camera_poses(episode, camera))]
    seen = {camera: frames_in_image(episode, camera, shapes[camera]).sum(0) for camera in fixed or shapes}
    least = SEEN * len(episode) if fixed else 1
    for number, arm in enumerate(episode.arms):
        if seen and all(counts[number] < least for counts in seen.values()):
            which = "end-effector" if episode.num_ee == 1 else f"end-effector {arm}"
            where = ", ".join(f"in {camera}'s image in {counts[number]}" for camera, counts in seen.items())
            why = "are the camera poses world_from_cam with OpenCV axes, quaternions in the order meant (xyzw, wxyz)"
            yield Fault("pose", f"{which} is {where} of {len(episode)} frames; {why}?")


def _videos(episode: Episode) -> Iterator[Fault]:
    """Videos that training's default reader refuses."""
    for camera in episode.cameras:
        if episode.is_video(camera):
            path, _ = episode.video_location(camera, 0)
            try:
                DecordReader.check(read_index(path))
            except DataError as error:
                yield Fault("video", f"{camera}/rgb: {error}")
