"""Renders scenes of blocks with the names and places of what they show, for a vision-language model to learn from.

    python -m examples.blocks.scenes --out data/blocks_scenes --scenes 14000 --workers 2

Written in parts (``apt.grounding.scenes``), each by one process and from its own seed; stopped, the same command goes
on.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from apt.grounding.scenes import Place, SetDescription, Thing, write_part
from data_utils.cli import CommandLineError, check_writable, parse
from data_utils.geometry.camera import project
from examples.blocks.env import BlocksEnv
from examples.blocks.world import load_world
from examples.errors import SimulatorError
from examples.headless import select_gl
from examples.pickplace.env import gripper_down
from examples.scene_parts import PER_PART, SCENES_STREAM, render_parts

GRIPPER_ANYWHERE = 0.6  # share of the scenes; in the others it is where episodes start
HELD = 0.25  # share of the scenes whose gripper is anywhere: a block is between the fingers
LOW, HIGH = (-0.06, -0.40, 0.86), (0.25, 0.30, 1.15)  # m in the world, where the gripper may be


@dataclass(frozen=True)
class ScenesConfig:
    out: Path
    """Folder for the parts."""
    scenes: int = 14000
    """How many; whole parts of 250 are made."""
    seed: int = 0
    workers: int = 2
    """Processes; one simulator each."""
    image_size: int = 128
    confusable: float | None = None
    """Share of the scenes in which blocks share a colour, and others a shape; None: as in the world's episodes."""

    def __post_init__(self) -> None:
        for name in ("scenes", "workers", "image_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be at least 1")


def scenes(env: BlocksEnv, rng: np.random.Generator) -> Iterator[tuple[np.ndarray, list[Thing]]]:
    """Images (Ncam, H, W, 3) and what they show, for ever."""
    while True:
        anywhere = rng.random() < GRIPPER_ANYWHERE
        pose = _anywhere(rng) if anywhere else env.draw_start_pose(rng)
        try:
            env.reset_scenery(rng, pose)
        except ValueError:  # out of the arm's reach
            continue
        if anywhere and rng.random() < HELD:
            env.hold(env.present[int(rng.integers(len(env.present)))])
        images = np.stack([env.renderer.rgb(camera) for camera in env.scene.cameras])
        yield (
            images,
            [
                Thing(
                    thing.name, thing.kind, tuple(_place(env, camera, thing.position) for camera in env.scene.cameras)
                )
                for thing in env.things()
            ],
        )


def _anywhere(rng: np.random.Generator) -> np.ndarray:
    pose = np.eye(4)
    pose[:3, :3] = gripper_down(np.pi / 2 + rng.uniform(-0.8, 0.8))
    pose[:3, 3] = rng.uniform(LOW, HIGH)
    return pose


def _place(env: BlocksEnv, camera: str, position: np.ndarray) -> Place:
    pixel, in_front = project(position, env.renderer.intrinsics(camera), env.renderer.world_from_cam(camera))
    u, v = pixel / env.image_size
    return (float(u), float(v)) if in_front and 0 <= u < 1 and 0 <= v < 1 else None


def render(config: ScenesConfig) -> None:
    """Make the parts that are missing."""
    load_world().with_confusable(config.confusable)  # complains here rather than in a worker
    select_gl()
    render_parts(config.out, config.scenes, config.workers, functools.partial(_render_part, config))


_worker_env: BlocksEnv | None = None  # this process's simulator, made for its first part


def _render_part(config: ScenesConfig, number: int) -> None:
    global _worker_env
    if _worker_env is None:
        _worker_env = BlocksEnv("SO", config.image_size, load_world().with_confusable(config.confusable))
    world = _worker_env.world
    sentences = (*world.instructions, *world.unseen_instructions)
    description = SetDescription(tuple(world.cameras), config.image_size, sentences)
    rng = np.random.default_rng([config.seed, number, SCENES_STREAM])
    write_part(config.out, number, description, PER_PART, scenes(_worker_env, rng))


def main() -> None:
    try:
        config = parse(
            ScenesConfig, sys.argv[1:], "python -m examples.blocks.scenes", "Render labelled scenes of blocks."
        )
        check_writable(config.out, "--out")
        render(config)
    except (CommandLineError, ValueError, ImportError, SimulatorError) as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
