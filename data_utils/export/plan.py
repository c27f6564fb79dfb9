"""What of the episode files goes into a LeRobot dataset: features, columns, and the mapping that leads back."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.spatial.transform import Rotation

from data_utils.errors import DataError
from data_utils.h5io import Episode

STATE_NAMES = ("x", "y", "z", "qx", "qy", "qz", "qw", "gripper")
IMAGES = "observation.images.{}"
PROMPTS = "apt/prompts"  # in the table of episodes
# Of LeRobot itself: one number per frame each.
DEFAULT_FEATURES = {
    "timestamp": "float32",
    "frame_index": "int64",
    "episode_index": "int64",
    "index": "int64",
    "task_index": "int64",
}


@dataclass(frozen=True)
class Kind:
    """What all episodes of one dataset share."""

    cameras: tuple[str, ...]
    num_ee: int
    has_desired: bool
    ee_indices: tuple[int, ...] | None


@dataclass(frozen=True)
class Entry:
    """One episode of the dataset to be."""

    path: Path
    length: int
    first: int  # frames of all episodes before it
    prompts: tuple[str, ...]
    has_subtasks: bool
    step: float  # median seconds between frames


def read_entries(paths: list[Path], open_episode: Callable[[Path], Episode]) -> tuple[Kind, list[Entry]]:
    """Read every episode's header.

    Raises:
        DataError: a file that cannot be read, or whose cameras or arms are not those of the first one.
    """
    entries: list[Entry] = []
    first_kind: Kind | None = None
    for path in paths:
        with open_episode(path) as episode:
            kind = Kind(episode.cameras, episode.num_ee, episode.has_desired, episode.ee_indices)
            first_kind = first_kind or kind
            for name, wanted in dataclasses.asdict(first_kind).items():
                if getattr(kind, name) != wanted:
                    what = f"{name} is {getattr(kind, name)}, {wanted} in {paths[0]}; export them separately"
                    raise DataError(f"{path}: {what}", "schema")
            start = entries[-1].first + entries[-1].length if entries else 0
            step = float(np.median(np.diff(episode.timestamps)))
            prompts = tuple(dict.fromkeys(episode.prompts))
            entries.append(Entry(path, len(episode), start, prompts, bool(episode.subtasks), step))
    return first_kind, entries


def features(kind: Kind, sizes: dict[str, tuple[int, int]], fps: int, with_subtasks: bool) -> dict[str, dict]:
    """The ``features`` of meta/info.json; ``sizes`` are height and width per camera."""
    names = [f"arm_{arm}.{name}" for arm in range(kind.num_ee) for name in STATE_NAMES]
    out: dict[str, dict] = {
        name: {"dtype": "float32", "shape": [len(names)], "names": names} for name in ("observation.state", "action")
    }
    for camera, (height, width) in sizes.items():
        info = {"video.height": height, "video.width": width, "video.codec": "h264", "video.channels": 3}
        info |= {"video.pix_fmt": pixel_format(height, width), "video.is_depth_map": False, "video.fps": fps}
        shape = [height, width, 3]
        names = ["height", "width", "channels"]
        info["has_audio"] = False
        out[IMAGES.format(camera)] = {"dtype": "video", "shape": shape, "names": names, "info": info}
    for name, (_, count) in own_columns(kind).items():
        out[name] = {"dtype": "float32", "shape": [count], "names": None}
    out["apt.timestamp"] = {"dtype": "float64", "shape": [1], "names": None}
    if with_subtasks:
        out["apt.subtask"] = {"dtype": "string", "shape": [1], "names": None}
    return out | {name: {"dtype": dtype, "shape": [1], "names": None} for name, dtype in DEFAULT_FEATURES.items()}


def pixel_format(height: int, width: int) -> str:
    """4:2:0 halves the colours' size, which odd images do not allow; those are kept whole."""
    return "yuv420p" if height % 2 == 0 and width % 2 == 0 else "yuv444p"


def own_columns(kind: Kind) -> dict[str, tuple[tuple[str, int | str], int]]:
    """Column -> what of an episode it holds, and how many numbers a frame: bit-equal float32, row-major."""
    out: dict[str, tuple[tuple[str, int | str], int]] = {}
    for arm in range(kind.num_ee):
        for suffix in ("", "_desired") if kind.has_desired else ("",):
            out[f"apt.ee_pose{suffix}.{arm}"] = (f"world_from_ee{suffix}", arm), 16
            out[f"apt.gripper{suffix}.{arm}"] = (f"gripper{suffix}", arm), 1
    for camera in kind.cameras:
        out[f"apt.pose.{camera}"] = ("world_from_cam", camera), 16
        out[f"apt.K.{camera}"] = ("K", camera), 9
    return out


def columns(episode: Episode, kind: Kind, with_subtasks: bool) -> dict[str, np.ndarray | list[str]]:
    """The columns of one episode but LeRobot's own: (T, n), or (T,) for one number a frame; T texts."""
    state = _state(episode.world_from_ee, episode.gripper)
    if kind.has_desired:
        action = _state(episode.world_from_ee_desired, episode.gripper_desired)
    else:  # what comes next is what was wanted
        action = np.concatenate([state[1:], state[-1:]])
    out: dict[str, np.ndarray | list[str]] = {"observation.state": state, "action": action}
    for name, ((what, which), count) in own_columns(kind).items():
        if isinstance(which, str):
            values = np.stack([getattr(episode, what)(which, t) for t in range(len(episode))])
        else:
            values = getattr(episode, what)[:, which]
        out[name] = values.astype(np.float32).reshape(-1, count).squeeze(1 if count == 1 else ())
    out["apt.timestamp"] = episode.timestamps
    if with_subtasks:
        texts = [""] * len(episode)
        for start, text in episode.subtasks:
            texts[start:] = [text] * (len(episode) - start)
        out["apt.subtask"] = texts
    return out


def _state(world_from_ee: np.ndarray, gripper: np.ndarray) -> np.ndarray:
    """(T, Nee, 4, 4) and (T, Nee) to (T, 8 Nee) float32: position, quaternion (x, y, z, w) and openness per arm."""
    T, num_ee = gripper.shape
    quaternion = Rotation.from_matrix(world_from_ee[..., :3, :3].reshape(-1, 3, 3)).as_quat().reshape(T, num_ee, 4)
    # One of the two quaternions of a rotation, the same from frame to frame.
    flips = np.sign(np.sum(quaternion[1:] * quaternion[:-1], axis=-1))
    quaternion[1:] *= np.cumprod(np.where(flips == 0, 1, flips), axis=0)[..., None]
    joined = np.concatenate([world_from_ee[..., :3, 3], quaternion, gripper[..., None]], axis=-1)
    return joined.reshape(T, -1).astype(np.float32)


def mapping(kind: Kind, with_subtasks: bool) -> dict:
    """The mapping file with which ``data_utils.convert lerobot`` makes the same episodes again."""

    def arm(index: int, suffix: str = "") -> dict:
        return {
            "pose": {"form": "matrix", "values": f"apt.ee_pose{suffix}.{index}"},
            "gripper": {"values": f"apt.gripper{suffix}.{index}", "closed": 0.0, "open": 1.0},
        }

    arms = [{"name": f"arm_{index}", **arm(index)} for index in range(kind.num_ee)]
    if kind.has_desired:
        arms = [{**item, "desired": arm(index, "_desired")} for index, item in enumerate(arms)]
    cameras = {
        camera: {
            "frames": IMAGES.format(camera),
            "K": {"form": "matrix", "values": f"apt.K.{camera}"},
            "axes": "opencv",
            "world_from_cam": {"form": "matrix", "values": f"apt.pose.{camera}"},
        }
        for camera in kind.cameras
    }
    out = {"timestamp": "apt.timestamp", "prompts": [{"episode": PROMPTS}], "arms": arms, "cameras": cameras}
    if with_subtasks:
        out["subtasks"] = "apt.subtask"
    if kind.ee_indices is not None:
        out["ee_indices"] = list(kind.ee_indices)
    return out
