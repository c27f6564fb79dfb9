"""What all sub-commands do with a result: name, show and write it."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

from data_utils.cli import CommandLineError
from data_utils.files import atomic_write
from data_utils.rig import RigCamera, read_rig, write_rig
from data_utils.words import counted

_NAMED = 8  # pictures that are named of many


def today() -> str:
    return datetime.date.today().isoformat()


def after_lens(camera: RigCamera, method: str) -> str:
    """How a pose was found, after how the camera's lens was."""
    lens = camera.method.split("; ")[0]
    return f"{lens}; {method}" if lens.startswith("intrinsics") else method


def arm_of(world_from_ee: np.ndarray, arm: int, path: Path) -> np.ndarray:
    """(4, 4) of (Nee, 4, 4)."""
    if not 0 <= arm < len(world_from_ee):
        raise CommandLineError(f"--arm is {arm}; {path} has {counted(len(world_from_ee), 'arm')}, counted from 0")
    return world_from_ee[arm]


def cameras_of(rig: Path) -> dict[str, RigCamera]:
    """Of a rig that may not be there yet."""
    return dict(read_rig(rig).cameras) if rig.exists() else {}


def put(rig: Path, name: str, camera: RigCamera) -> None:
    """Into the file; other cameras stay."""
    cameras = cameras_of(rig)
    had = cameras.get(name)
    if had is not None and camera.world_from_cam is None and camera.ee_from_cam is None:
        if had.world_from_cam is not None or had.ee_from_cam is not None:
            print(f"the pose that {name} had belonged to its old intrinsics and is gone; calibrate it again")
    rig.parent.mkdir(parents=True, exist_ok=True)
    write_rig(rig, cameras | {name: camera})
    print(f"wrote {name} into {rig}")


def some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


def position(pose: np.ndarray) -> str:
    return "({:.4f}, {:.4f}, {:.4f}) m".format(*pose[:3, 3])


def axis(pose: np.ndarray) -> str:
    return "({:.2f}, {:.2f}, {:.2f})".format(*pose[:3, 2])


def write_png(path: Path, image: np.ndarray) -> None:
    """(H, W, 3) uint8 RGB."""
    path.parent.mkdir(parents=True, exist_ok=True)
    encoded = cv2.imencode(".png", cv2.cvtColor(image, cv2.COLOR_RGB2BGR))[1]
    atomic_write(path, lambda temporary: temporary.write_bytes(encoded.tobytes()))
