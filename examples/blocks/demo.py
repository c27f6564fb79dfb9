"""The shipped policy at work: one instruction as a video, or a page to steer a world of blocks from.

    python -m examples.blocks.demo "put the red cube in the blue tray"
    python -m examples.blocks.demo --web

scripts/demo.sh sets everything up first.
"""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from apt.hub import located
from data_utils.cli import cores
from data_utils.drawing.mp4 import VideoWriter
from examples.blocks.env import BlocksEnv
from examples.blocks.shipped import POLICY, load_planner, model_policy
from examples.blocks.world import load_world
from examples.errors import SimulatorError
from examples.pickplace.rollout import EpisodeResult, run_episode
from examples.pickplace.video import episode_view

INSTRUCTION = "put the red cube in the blue tray"
PAUSE = 10  # frames of a video behind the end


@dataclass(frozen=True)
class DemoConfig:
    instruction: Annotated[str | None, tyro.conf.Positional] = None
    """What to do, e.g. "put the red cube in the blue tray"; it names a block and a tray."""
    out: Path = Path("demo_out")
    """Folder for the video."""
    web: bool = False
    """Open a page instead, where the instruction can be changed at any moment."""
    host: str = "127.0.0.1"
    """Where the page is served; anybody who reaches it steers the world."""
    port: int = 8080
    ckpt: Path = POLICY
    """The policy: a run's .pt, or an exported folder."""
    ema: bool = False
    """Use the averaged weights of --ckpt."""
    seed: int = 0
    """Of what lies where."""
    max_steps: int = 110
    device: str = "cpu"


def report(result: EpisodeResult) -> str:
    """What happened, in a sentence."""
    parts = [f"the gripper went to the {result.approached} first" if result.approached else "it reached no block"]
    parts.append(f"lifted the {result.lifted}" if result.lifted else "lifted none")
    if result.ended_in:
        parts.append(f"and the {result.object} ended in the {result.ended_in}")
    else:
        parts.append(f"and the {result.object} is in no tray")
    verdict = f"success after {result.steps} steps" if result.success else f"no success within {result.steps} steps"
    return f"{verdict}: {', '.join(parts)}"


def run(config: DemoConfig, planner) -> tuple[EpisodeResult, Path]:
    """One episode for the instruction, and its video.

    Raises:
        ValueError: the instruction does not name a block and a tray.
    """
    instruction = INSTRUCTION if config.instruction is None else config.instruction
    load_world().request(instruction)  # before the simulator starts
    policy = model_policy(planner, config.seed)
    name = re.sub(r"[^a-z0-9]+", "_", instruction.lower()).strip("_")
    path = config.out / f"{name}.mp4"
    with BlocksEnv() as env, VideoWriter(path) as video:
        env.reset_for([config.seed, 0], instruction)

        def add(pose: np.ndarray, openness: float) -> None:
            video.add(episode_view(env, policy.path))

        result = run_episode(env, policy, config.max_steps, on_step=add)
        for _ in range(PAUSE):
            add(env.world_from_ee, env.openness)
    return result, path


def main(argv: Sequence[str] | None = None) -> None:
    config = tyro.cli(DemoConfig, args=argv, prog="python -m examples.blocks.demo", description=__doc__)
    try:
        _main(config)
    except (ValueError, OSError, ImportError, SimulatorError) as error:
        raise SystemExit(f"error: {error}") from error
    except KeyboardInterrupt:
        print()


def _main(config: DemoConfig) -> None:
    config = dataclasses.replace(config, ckpt=located(config.ckpt))
    if not config.ckpt.exists():
        raise FileNotFoundError(f"--ckpt {config.ckpt} does not exist")
    if config.instruction is not None:
        load_world().request(config.instruction)  # before a model is loaded
    started = time.monotonic()
    planner = _load(config)
    if config.web:
        from examples.blocks.web import DemoServer

        server = DemoServer(planner, BlocksEnv, config.host, config.port, config.seed, config.instruction)
        print(f"open {server.url}; Ctrl-C ends it", flush=True)
        server.run()
        return
    result, path = run(config, planner)
    print(f"{result.prompt}\n{report(result)}\nvideo: {path} ({time.monotonic() - started:.0f} s in all)")


def _load(config: DemoConfig):
    import torch  # not for --help

    torch.set_num_threads(cores())
    return load_planner(config.ckpt, config.device, use_ema=config.ema, seed=config.seed)


if __name__ == "__main__":
    main()
