"""Do converted poses, intrinsics and images agree? Asked of MuJoCo's segmentation, for every frame.

    python -m examples.libero.check_projection --episodes DIR [--picture strip.png]

The stored end-effector position (the grip site, between the finger tips), projected with the stored camera pose and
K, must lie within the box around the pixels that show the gripper, in every frame and camera in which any does.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from data_utils.cli import CommandLineError, parse
from data_utils.drawing.paths import RECORDED, draw_trajectory, enlarge
from data_utils.errors import DataError
from data_utils.geometry.camera import project
from data_utils.h5io import Episode
from examples.errors import SimulatorError
from examples.libero import environment
from examples.libero.replay import converted_episodes, follow, initial_state, start

COMMAND = "examples.libero.check_projection"
LOST = 0.003  # m: a replay further off the recording no longer shows what its frames show
STRIP_FRAMES = 5
SCALE = 2  # of the images in the picture, so that lines are finer than their pixels
AXIS = 0.06  # m, of the drawn end-effector axes


@dataclass(frozen=True)
class Arguments:
    episodes: Path
    """Folder of converted episodes, searched with its sub-folders, or one of them."""
    picture: Path | None = None
    """PNG for a strip of frames of every task's first episode: axes of the end-effector and its future path."""


@dataclass(frozen=True)
class Verdict:
    """Of one episode and camera."""

    frames: int  # that show the gripper and were compared
    inside: int  # in which the end-effector projects into its box
    lost: int  # in which the replay had left the recording


def main(argv: list[str]) -> int:
    """Exit code: 0, 1 where a frame disagrees, 2 where nothing could be checked."""
    try:
        arguments = parse(Arguments, argv, f"python -m {COMMAND}", "Check converted LIBERO episodes' poses.")
        environment.enter_libero(COMMAND)
        files = converted_episodes(arguments.episodes)
        if arguments.picture is not None:
            first_of_task = {path.parent: path for path in reversed(files)}
            strips = np.concatenate([strip(path) for path in sorted(first_of_task.values())])
            cv2.imwrite(str(arguments.picture), strips[..., ::-1])
        agree = True
        for path in files:
            for camera, verdict in check(path).items():
                agree &= verdict.inside == verdict.frames > 0 and not verdict.lost
                counts = f"{verdict.inside}/{verdict.frames} frames agree, {verdict.lost} not comparable"
                print(f"{path.parent.name}/{path.stem} {camera}: {counts}", flush=True)
    except (CommandLineError, DataError, SimulatorError, ImportError) as error:
        print(f"python -m {COMMAND}: {error}", file=sys.stderr)
        return 2
    return 0 if agree else 1


def check(path: Path) -> dict[str, Verdict]:
    """Camera -> verdict for an episode, by replaying it."""
    simulator = environment.import_simulator()
    with Episode(path) as episode:
        task, state, fixtures = initial_state(episode)
        height = episode.rgb(episode.cameras[0], 0).shape[0]
        counts = {camera: np.zeros(3, int) for camera in episode.cameras}
        with simulator.LiberoEnv(task, height) as env:
            start(env, state, fixtures)
            for frame in follow(env, episode):
                position = episode.world_from_ee[frame, 0, :3, 3]
                lost = np.linalg.norm(env.world_from_ee[:3, 3] - position) > LOST
                for camera in episode.cameras:
                    box = bounding_box(env.gripper_mask(camera))
                    if lost or box is None:
                        counts[camera][2] += lost
                        continue
                    K, world_from_cam = episode.K(camera, frame), episode.world_from_cam(camera, frame)
                    pixel, visible = project(position, K, world_from_cam)
                    counts[camera] += (1, bool(visible and (box[0] <= pixel).all() and (pixel <= box[1]).all()), 0)
    return {camera: Verdict(*map(int, count)) for camera, count in counts.items()}


def bounding_box(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """Lower and upper corner (2,), as x and y, of the pixels of ``mask`` (H, W) bool; None where there are none."""
    rows, columns = np.nonzero(mask)
    if not len(rows):
        return None
    return np.array([columns.min(), rows.min()]), np.array([columns.max() + 1, rows.max() + 1])


def strip(path: Path) -> np.ndarray:
    """Frames of an episode side by side, a row per camera, with the end-effector's axes and its future path."""
    with Episode(path) as episode:
        frames = np.linspace(0, len(episode) - 1, STRIP_FRAMES, dtype=int)
        rows = [np.concatenate([drawn(episode, camera, i) for i in frames], axis=1) for camera in episode.cameras]
    return np.concatenate(rows)


def drawn(episode: Episode, camera: str, frame: int) -> np.ndarray:
    """One enlarged frame (H, W, 3) uint8 RGB with the path in green and the axes x, y, z in red, green, blue."""
    image, K = enlarge(episode.rgb(camera, frame), episode.K(camera, frame), SCALE)
    world_from_cam, world_from_ee = episode.world_from_cam(camera, frame), episode.world_from_ee[:, 0]
    future = world_from_ee[frame:, :3, 3]
    image = draw_trajectory(image, K, world_from_cam, future, episode.gripper[frame:, 0], RECORDED)
    origin, tips = world_from_ee[frame, :3, 3], world_from_ee[frame, :3, 3] + AXIS * world_from_ee[frame, :3, :3].T
    pixels, visible = project(np.stack([origin, *tips]), K, world_from_cam)
    for axis in range(3):
        if visible.all():
            ends = (tuple(int(value) for value in np.round(pixels[i])) for i in (0, axis + 1))
            color = tuple(255 if channel == axis else 40 for channel in range(3))
            cv2.line(image, *ends, color, 2 * SCALE, cv2.LINE_AA)
    return image


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
