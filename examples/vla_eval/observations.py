"""vla-eval's observations as this library's frames, and chunks as the rows that its benchmarks execute."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from scipy.spatial.transform import Rotation

from apt.infer.openpi_profile import GRIPPER_OPENS, ProfileReader

# LIBERO's observations are what openpi's client sends, under other names; that client's profile has the calibration.
OPENPI_NAMES = {
    "images/agentview": "observation/image",
    "images/wrist": "observation/wrist_image",
    "states": "observation/state",
    "task_description": "prompt",
}
LIVING_ROOM, STUDY = (0, 1, 4, 6, 7), (5,)  # tasks of libero_10; the others are in a kitchen
CALIBRATION = "calibration"


def libero_scene(suite: str, task_id: int) -> str:
    """Of the profile ``libero``: where the fixed camera stands in a task of LIBERO or LIBERO-PRO.

    Raises:
        ValueError: a suite whose tasks are not known.
    """
    for name, scene in (("libero_spatial", "tabletop"), ("libero_goal", "tabletop"), ("libero_object", "floor")):
        if suite.startswith(name):
            return scene
    if suite.startswith("libero_10"):
        return "living_room" if task_id in LIVING_ROOM else "study" if task_id in STUDY else "tabletop"
    raise ValueError(
        f"where the camera of the suite {suite!r} stands is not known; let the benchmark send it "
        "(examples.vla_eval.benchmark)"
    )


def flattened(observation: Mapping[str, Any]) -> dict[str, Any]:
    """``{"images": {"agentview": ...}}`` as ``{"images/agentview": ...}``, LIBERO's also by openpi's names."""
    flat: dict[str, Any] = {}
    for key, value in observation.items():
        if isinstance(value, Mapping):
            flat |= {f"{key}/{name}": inner for name, inner in value.items()}
        else:
            flat[key] = value
    return flat | {theirs: flat[ours] for ours, theirs in OPENPI_NAMES.items() if ours in flat}


def frame_of(observation: Mapping[str, Any], reader: ProfileReader, step: int) -> dict[str, Any]:
    """A frame (:func:`apt.infer.frames.parse_frame`) of control step ``step``.

    Cameras of the observation's ``calibration``, ``{camera: {"K": (3, 3), "world_from_cam": (4, 4)}}``, are as it says,
    whatever the profile has.

    Raises:
        ValueError: what is missing in the observation, or wrong.
    """
    seen = {name: value for name, value in observation.items() if name != CALIBRATION}
    frame = {**reader.frame(flattened(seen)), "timestamp": float(step)}
    for camera, known in (observation.get(CALIBRATION) or {}).items():
        if camera not in reader.profile.cameras:
            there = ", ".join(reader.profile.cameras)
            raise ValueError(f"{CALIBRATION} is of {camera!r}; the profile's cameras are {there}")
        frame[camera]["camera"]["K"] = np.array(known["K"], np.float64)
        frame[camera]["data"]["wcT"] = np.array(known["world_from_cam"], np.float64)
    return frame


def absolute_rows(poses: np.ndarray, openness: np.ndarray) -> np.ndarray:
    """Rows (T, 7) float32 of ``poses`` (T, 4, 4) in the world and openness (T,): position (m), rotation vector,
    and 1 to close or -1 to open, as LIBERO executes them with ``absolute_action``."""
    turned = Rotation.from_matrix(poses[:, :3, :3]).as_rotvec()
    closes = np.where(openness >= GRIPPER_OPENS, -1.0, 1.0)[:, None]
    return np.hstack([poses[:, :3, 3], turned, closes]).astype(np.float32)
