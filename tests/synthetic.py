"""Small synthetic episodes in the project's format: a gripper that reaches for a coloured square two cameras see."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from scipy.spatial.transform import Rotation

from data_utils.h5io import EpisodeWriter

CAMERAS = ("e2h_cam", "eih_cam")
COLORS = {"red": (220, 30, 30), "blue": (30, 60, 220)}


def write_episode(
    path: Path,
    seed: int,
    length: int = 24,
    size: int = 96,
    prompt: str | None = None,
    cameras: tuple[str, str] = CAMERAS,
    dt: float = 1.0,
) -> Path:
    """One single-arm episode for ``PickPlaceCan``, or for others by the names of a fixed and a wrist camera and the
    time between frames; the prompt names the square that the gripper reaches for."""
    rng = np.random.default_rng(seed)
    names = list(COLORS)
    goals = {name: np.array([0.3 + 0.2 * rng.random(), rng.uniform(-0.2, 0.2), 0.0]) for name in names}
    target = names[seed % len(names)]
    start = np.array([0.4, 0.0, 0.4]) + rng.normal(0, 0.02, 3)
    K = np.array([[size, 0, size / 2], [0, size, size / 2], [0, 0, 1.0]])
    world_from_e2h = pose([0.4, 0.0, 1.0])  # looks straight down
    with EpisodeWriter(path, list(cameras), 1, prompt or f"reach for the {target} square") as writer:
        for step in range(length):
            share = step / (length - 1)
            position = start + share * (goals[target] - start)
            world_from_ee = pose(position)
            world_from_eih = pose(position + [0.0, 0.05, 0.1])
            poses = dict(zip(cameras, (world_from_e2h, world_from_eih), strict=True))
            images = {name: render(goals, K, world_from_cam, size, rng) for name, world_from_cam in poses.items()}
            writer.add_frame(
                step * dt, world_from_ee[None], np.array([1.0 - share]), images, poses, {c: K for c in cameras}
            )
    return path


def pose(translation) -> np.ndarray:
    """A camera or gripper that looks down the world's -z: half a turn about x."""
    transform = np.eye(4)
    transform[:3, :3] = Rotation.from_quat([1, 0, 0, 0]).as_matrix()
    transform[:3, 3] = translation
    return transform


def render(goals, K, world_from_cam, size, rng) -> np.ndarray:
    image = rng.integers(90, 110, (size, size, 3)).astype(np.uint8)
    for name, goal in goals.items():
        u, v, w = K @ (np.linalg.inv(world_from_cam) @ np.append(goal, 1.0))[:3]
        if w > 0.02:
            u, v, half = int(u / w), int(v / w), max(2, int(0.03 * size / w))
            image[max(0, v - half) : max(0, v + half), max(0, u - half) : max(0, u + half)] = COLORS[name]
    return image
