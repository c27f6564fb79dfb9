"""What an episode may hold by the rules, but hardly on purpose: warnings, each with the mistake that leads to it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator

import numpy as np

from data_utils.checks.visibility import camera_poses, frames_in_image, is_moving
from data_utils.episodes import schema
from data_utils.errors import RULES, DataError, Fault
from data_utils.geometry.motion import FAR, FASTEST_HAND, median_speed, other_orders, turning
from data_utils.geometry.pinhole import off_centre
from data_utils.h5io import Episode
from data_utils.video import VideoCache
from data_utils.video.index import read_index
from data_utils.video.readers import DecordReader
from data_utils.words import counted

GAP = 10.0  # times the median step
SHORTEST_STEP, LONGEST_STEP = 1e-3, 2.0  # seconds between frames; simulated sets count steps of 1
LOOSE, FIRM = 5.0, 1.0  # degrees: what no camera turns that is fixed to a hand; what one may
NEARLY_CLOSED = 0.2
LIFT = 0.03  # metres: more than a hand that stays where it is
SEEN = 0.05  # of the frames: what at least one fixed camera sees of an end-effector that is where its pose says


def find_warnings(path: str | os.PathLike, videos: VideoCache, video_root: str | None = None) -> list[Fault]:
    """Unusual things in a file without faults; rules are those that they almost break.

    Raises:
        DataError: the file has faults.
    """
    with Episode(path, None, video_root, videos) as episode:
        shapes = {camera: episode.rgb(camera, 0).shape[:2] for camera in episode.cameras}
        return [
            *_remarks(episode),
            *_prompts(episode),
            *_distances(episode),
            *_speeds(episode),
            *_gripper(episode),
            *_times(episode),
            *_principal_points(episode, shapes),
            *_visibility(episode, shapes),
            *_wrists(episode),
            *_videos(episode),
        ]


def _remarks(episode: Episode) -> Iterator[Fault]:
    """What converting it found unusual."""
    for line in str(episode.attributes.get(schema.REMARKS_ATTR, "")).split("\n"):
        rule, colon, what = line.partition(": ")
        if colon and rule in RULES:
            yield Fault(rule, what)


def _speeds(episode: Episode) -> Iterator[Fault]:
    for arm in episode.arms:
        speed = median_speed(episode.world_from_ee[:, arm], episode.timestamps)
        if speed > FASTEST_HAND:
            what = "are positions in millimetres, or times in another unit?"
            yield Fault("pose", f"end-effector {arm} moves at {speed:.4g} m/s in the median; {what}")


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
        elif openness.max() < NEARLY_CLOSED:
            what = f"gripper of end-effector {arm} is {openness.max():.3g} at most"
            yield Fault("gripper", f"{what}, where 1 is open; is it a width in metres?")
        elif (carried := carried_open(openness, episode.world_from_ee[:, arm, 2, 3])) is not None:
            first, last = carried
            what = f"end-effector {arm} comes down closed, opens at frame {first}, is lifted and closes at frame {last}"
            yield Fault("gripper", f"{what}, as one that holds something does the other way round; is openness 1 open?")


def carried_open(openness: np.ndarray, height: np.ndarray) -> tuple[int, int] | None:
    """First and last frame in which a gripper is open, where it would pick up and put down if that were closed.

    Args:
        openness: (T,); height: (T,) of the hand, metres.
    """
    is_open = openness > 0.5
    flips = np.flatnonzero(np.diff(is_open))
    if is_open[0] or len(flips) != 2:
        return None
    first, last = int(flips[0]) + 1, int(flips[1])
    top = height[first : last + 1].max()
    lifted = min(height[0], top) - height[first] > LIFT and top - height[last] > LIFT
    return (first, last) if lifted else None


def _times(episode: Episode) -> Iterator[Fault]:
    steps = np.diff(episode.timestamps)
    median = float(np.median(steps))
    if not SHORTEST_STEP <= median <= LONGEST_STEP:
        what = f"timestamp has a frame every {median:.4g} s in the median"
        yield Fault("time", f"{what}; are times in seconds, as sample_dt and record_dt of the dataset class are?")
    gaps = np.flatnonzero(steps > GAP * median) if median > 0 else np.flatnonzero(steps < 0)
    if len(gaps):
        first = int(gaps[0])
        which = f"timestamp has {counted(len(gaps), 'gap')}, the first of {steps[first]:g} s after frame {first}"
        yield Fault("time", f"{which}, where {median:g} s is usual; were frames lost?")


def _principal_points(episode: Episode, shapes: dict[str, tuple[int, int]]) -> Iterator[Fault]:
    for camera, (height, width) in shapes.items():
        remark = off_centre(episode.K(camera, 0), (height, width))
        if remark is not None:
            yield Fault("intrinsics", f"{camera}/K: {remark}; does K belong to the stored size?")


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


def _wrists(episode: Episode) -> Iterator[Fault]:
    """Moving cameras that turn against every hand, and would not if a hand's quaternions were read in another order."""
    for camera in episode.cameras:
        poses = camera_poses(episode, camera)
        if not is_moving(poses):
            continue
        cam, hands = poses[:, :3, :3], episode.world_from_ee[:, list(episode.arms), :3, :3]
        as_read = [turning(hands[:, arm], cam) for arm in range(hands.shape[1])]
        otherwise = [turning(other, cam) for arm in range(hands.shape[1]) for other in other_orders(hands[:, arm])]
        if min(as_read) > LOOSE and min(otherwise) < FIRM:
            what = f"{camera} turns by up to {min(as_read):.0f} degrees against every hand"
            other = f"with the numbers of a hand's quaternion in another order by {min(otherwise):.2g}"
            yield Fault("rotation", f"{what}, {other}; is order (xyzw, wxyz) the recording's?")


def _videos(episode: Episode) -> Iterator[Fault]:
    """Videos that training's default reader refuses."""
    for camera in episode.cameras:
        if episode.is_video(camera):
            path, _ = episode.video_location(camera, 0)
            try:
                DecordReader.check(read_index(path))
            except DataError as error:
                yield Fault("video", f"{camera}/rgb: {error}")
