"""Robot frames, as users hand them to the planner: checked and turned into camera images and a state."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np

from data_utils.config import DataConfig
from data_utils.geometry.camera import CameraFrame
from data_utils.geometry.pinhole import intrinsics_fault
from data_utils.h5io import Episode

ENCODINGS = ("rgb", "bgr", "compress")


@dataclass(frozen=True)
class RobotFrame:
    """One moment of the robot."""

    timestamp: float
    cameras: dict[str, CameraFrame]
    world_from_ee: np.ndarray  # (Nee, 4, 4) float64
    gripper: np.ndarray  # (Nee,) float64


def parse_frame(obs_frame: dict[str, Any], config: DataConfig) -> RobotFrame:
    """Check an ``obs_frame`` and copy what the policy needs.

    Args:
        obs_frame: per camera ``{"model": "pinhole", "camera": {"width", "height", "K"}, "data": {...}}``; its data are
            "color" (H, W, 3) uint8, "wcT" (4, 4) camera-to-world, "seg" None or an (H, W) mask of valid pixels, and
            "encoding" of the colour, "rgb" (default), "bgr" or "compress" (JPEG bytes); and ``ee_pose`` (Nee, 4, 4) or
            (4, 4), ``gripper`` (Nee,) or a number in [0, 1], ``timestamp`` in the unit of the
            config's ``sample_dt`` (seconds on robots, control steps in the simulators).
    Raises:
        ValueError: names the key and what was wanted.
    """
    if not isinstance(obs_frame, dict):
        raise ValueError(f"the frame is a {type(obs_frame).__name__}; wanted a dictionary")
    cameras = {name: parse_camera(name, obs_frame.get(name)) for name in config.cameras}
    return RobotFrame(parse_time(obs_frame), cameras, *parse_arms(obs_frame, config))


def check_follows(frame: RobotFrame, earlier: RobotFrame) -> None:
    """Raise ValueError where ``frame`` cannot come after ``earlier`` in one episode."""
    if frame.timestamp <= earlier.timestamp:
        raise ValueError(
            f"timestamp {frame.timestamp} is not later than the previous frame's {earlier.timestamp}; "
            "reset() before a new episode"
        )
    arms, arms_before = len(frame.world_from_ee), len(earlier.world_from_ee)
    if arms != arms_before:
        raise ValueError(f"ee_pose has {arms} arms, earlier frames {arms_before}; reset() before a new episode")
    for name, camera in frame.cameras.items():
        size, before = camera.rgb.shape[:2], earlier.cameras[name].rgb.shape[:2]
        if size != before:
            raise ValueError(
                f"{name}.data.color is {size[0]}x{size[1]}, earlier frames {before[0]}x{before[1]}; "
                "reset() before a new episode"
            )


def parse_arms(obs_frame: dict[str, Any], config: DataConfig) -> tuple[np.ndarray, np.ndarray]:
    """``world_from_ee`` (Nee, 4, 4) and openness (Nee,) of a frame. Raises ValueError, naming the key."""
    pose = _array(obs_frame, "ee_pose")
    pose = pose[None] if pose.ndim == 2 else pose
    gripper = np.atleast_1d(_array(obs_frame, "gripper"))
    arms = len(pose) if pose.ndim else 0
    if pose.shape[1:] != (4, 4) or not 1 <= arms <= config.num_arms:
        raise ValueError(f"ee_pose has shape {pose.shape}; wanted (Nee, 4, 4) with Nee from 1 to {config.num_arms}")
    if gripper.shape != (arms,):
        raise ValueError(f"gripper has shape {gripper.shape}; wanted ({arms},), one openness per arm of ee_pose")
    if (gripper < -1e-3).any() or (gripper > 1 + 1e-3).any():
        raise ValueError(f"gripper is {gripper.tolist()}; wanted openness from 0 (closed) to 1 (open)")
    for arm, transform in enumerate(pose):
        _check_rigid(f"ee_pose[{arm}]", transform)
    return pose, gripper


def parse_time(obs_frame: dict[str, Any]) -> float:
    """The moment of a frame. Raises ValueError."""
    timestamp = _array(obs_frame, "timestamp")
    if timestamp.ndim != 0:
        raise ValueError(f"timestamp has shape {timestamp.shape}; wanted one number")
    return float(timestamp)


def _array(frame: dict[str, Any], key: str, where: str = "") -> np.ndarray:
    if not isinstance(frame, dict) or frame.get(key) is None:
        raise ValueError(f"{where}{key} is missing from the frame")
    try:
        array = np.array(frame[key], dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}{key} is not numeric: {error}") from error
    if not np.isfinite(array).all():
        raise ValueError(f"{where}{key} holds NaN or infinity")
    return array


def _check_rigid(name: str, transform: np.ndarray) -> None:
    rotation = transform[:3, :3]
    if np.abs(rotation @ rotation.T - np.eye(3)).max() > 1e-3 or np.linalg.det(rotation) < 0:
        raise ValueError(f"{name} is not a rigid transform: its upper left 3x3 is no rotation matrix")
    if np.abs(transform[3] - [0, 0, 0, 1]).max() > 1e-6:
        raise ValueError(f"{name} is not a rigid transform: its last row is {transform[3].tolist()}")


def parse_camera(name: str, value: Any) -> CameraFrame:
    """The image of camera ``name`` and where it was taken from. Raises ValueError, naming the key."""
    if not isinstance(value, dict):
        raise ValueError(f"camera {name!r} is missing from the frame")
    where = f"{name}."
    if value.get("model", "pinhole") != "pinhole":
        raise ValueError(f"{where}model is {value['model']!r}; only 'pinhole' is supported")
    intrinsics, data = value.get("camera"), value.get("data")
    K = _array(intrinsics, "K", where + "camera.")
    if K.shape != (3, 3):
        raise ValueError(f"{where}camera.K has shape {K.shape}; wanted (3, 3)")
    pose = _array(data, "wcT", where + "data.")
    if pose.shape != (4, 4):
        raise ValueError(f"{where}data.wcT has shape {pose.shape}; wanted (4, 4)")
    _check_rigid(where + "data.wcT", pose)
    color = _color(where + "data.color", data.get("color"), data.get("encoding", "rgb"))
    height, width = color.shape[:2]
    if (intrinsics.get("height", height), intrinsics.get("width", width)) != (height, width):
        raise ValueError(
            f"{where}data.color is {height}x{width}, but {where}camera says "
            f"{intrinsics.get('height')}x{intrinsics.get('width')}, which K belongs to"
        )
    fault = intrinsics_fault(K[None], (height, width))
    if fault is not None:
        raise ValueError(
            f"{where}camera.K {fault[1]} ([[fx, 0, cx], [0, fy, cy], [0, 0, 1]] in pixels of the image that is sent)"
        )
    mask = data.get("seg")
    if mask is not None:
        try:
            mask = np.asarray(mask).astype(bool)
        except ValueError as error:
            raise ValueError(f"{where}data.seg is no mask: {error}") from error
        if mask.shape != (height, width):
            raise ValueError(f"{where}data.seg has shape {mask.shape}; wanted ({height}, {width})")
    return CameraFrame(color, K.astype(np.float32), pose.astype(np.float32), mask)


def _color(name: str, value: Any, encoding: str) -> np.ndarray:
    if value is None:
        raise ValueError(f"{name} is missing from the frame")
    if encoding == "compress":
        if not isinstance(value, (bytes, bytearray, np.ndarray)) or len(value) == 0:
            raise ValueError(f"{name} is a {type(value).__name__}; wanted the bytes of a JPEG image")
        decoded = cv2.imdecode(np.frombuffer(value, np.uint8), cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
        if decoded is None:
            raise ValueError(f"{name} does not decode as a JPEG image")
        return cv2.cvtColor(decoded, cv2.COLOR_BGR2RGB)
    if encoding not in ENCODINGS:
        raise ValueError(f"{name} has encoding {encoding!r}; wanted one of {', '.join(ENCODINGS)}")
    if isinstance(value, (bytes, bytearray, memoryview)):
        raise ValueError(
            f'{name} is bytes, and its encoding is {encoding!r}; JPEG bytes want "encoding": "compress" beside them'
        )
    image = np.asarray(value)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"{name} is {image.dtype} of shape {image.shape}; wanted uint8 (H, W, 3)")
    # Copied: the caller may reuse its buffer before the policy looks.
    return np.array(image[..., ::-1] if encoding == "bgr" else image, order="C")


def frame_from_episode(episode: Episode, index: int, config: DataConfig) -> dict[str, Any]:
    """A recorded moment in the form a robot would hand it over: what :func:`parse_frame` takes."""
    arms = list(episode.ee_indices if episode.ee_indices is not None else config.ee_indices)
    frame: dict[str, Any] = {
        "ee_pose": episode.world_from_ee[index, arms],
        "gripper": episode.gripper[index, arms],
        "timestamp": float(episode.times(config.record_dt)[index]),
    }
    for camera in config.cameras:
        shown = episode.camera_frame(camera, index)
        height, width = shown.rgb.shape[:2]
        frame[camera] = {
            "model": "pinhole",
            "camera": {"width": width, "height": height, "K": shown.K},
            "data": {"color": shown.rgb, "wcT": shown.world_from_cam, "seg": shown.mask},
        }
    return frame
