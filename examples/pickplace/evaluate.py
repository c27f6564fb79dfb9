"""Runs a policy in closed loop in the simulator and reports how often it does what the instruction says.

    python -m examples.pickplace.evaluate --ckpt runs/stage2/ckpt_latest.pt --episodes 20 --out results/pickplace

Written into ``--out``: ``episodes.csv``, ``summary.json`` and, with ``--video``, an MP4 per episode.
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import importlib.metadata
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import tyro

from data_utils.cli import bar
from data_utils.drawing.mp4 import VideoWriter
from data_utils.files import atomic_write, write_json
from examples.errors import SimulatorError
from examples.pickplace.env import PickPlaceEnv
from examples.pickplace.expert import ScriptedExpert
from examples.pickplace.policies import ModelPolicy, RandomPolicy, ReplayPolicy
from examples.pickplace.record import read_dataset
from examples.pickplace.rollout import EpisodeResult, Policy, run_episode
from examples.pickplace.scene import Task, load_scene
from examples.pickplace.video import episode_view
from examples.statistics import wilson_interval

if TYPE_CHECKING:
    from apt.infer.planner import TrajPlanner

EVALUATION_STREAM = 2  # last number of every seed here: initial states that no recording has
VERSIONS_OF = ("robosuite", "mujoco", "numpy", "torch")


@dataclass(frozen=True)
class EvaluateConfig:
    out: Path
    """Folder for the results."""
    ckpt: Path | None = None
    """Checkpoint of the model; needed by --policy model."""
    policy: Literal["model", "expert", "replay", "random"] = "model"
    episodes: int = 20
    seed: int = 0
    execute_steps: int = 8
    """Control steps between two queries of the model."""
    max_steps: int = 120
    """Control steps after which an episode counts as failed."""
    ensemble: int = 0
    """Queries that a trajectory is averaged over; 0: the newest alone."""
    ema: bool = False
    """Use the averaged weights."""
    denoising_steps: int | None = None
    """Of the diffusion sampler; None: the planner's default."""
    video: bool = False
    """Write an MP4 per episode, with the path being followed drawn in."""
    device: str = "cpu"
    demos: Path | None = None
    """Recorded folder; needed by --policy replay."""
    image_size: int = 256
    scene: str = "pickplace"
    setting: str | None = None
    """One of the scene file's settings, e.g. UO of --scene trays; None: the scene's own tasks."""
    paraphrases: int | None = None
    """Instructions are drawn from each task's first so many; None: from all."""

    def __post_init__(self) -> None:
        for name in ("episodes", "execute_steps", "max_steps", "image_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be at least 1")
        for policy, name, path in (("model", "ckpt", self.ckpt), ("replay", "demos", self.demos)):
            if self.policy == policy and (path is None or not path.exists()):
                raise ValueError(f"--policy {policy} needs an existing --{name}; given: {path}")


def evaluate(config: EvaluateConfig, planner: TrajPlanner | None = None) -> dict:
    """Runs the episodes, writes the results and returns the summary.

    ``planner`` is of ``config.ckpt``, where that is loaded already.
    """
    started = time.monotonic()
    scene = load_scene(config.scene)
    if config.setting is not None:
        scene = scene.in_setting(config.setting)
    config.out.mkdir(parents=True, exist_ok=True)
    rows: list[dict] = []
    with PickPlaceEnv(scene, config.image_size, config.paraphrases) as env:
        episodes = _episodes(config, env, planner)
        for index, (seed, task, policy) in enumerate(bar(episodes, total=config.episodes, unit="episode")):
            env.reset(seed, task)
            video = VideoWriter(config.out / "videos" / f"episode_{index:03d}.mp4") if config.video else nullcontext()
            with video as writer:

                def add_to_video(pose, openness, writer=writer, policy=policy) -> None:
                    if writer is not None:
                        next_step = np.stack([env.world_from_ee, pose])
                        writer.add(episode_view(env, next_step if policy.path is None else policy.path))

                result = run_episode(env, policy, config.max_steps, on_step=add_to_video)
            rows.append(_row(index, seed, result))
            _write_csv(config.out / "episodes.csv", rows)
    summary = summarize(rows)
    versions = {name: importlib.metadata.version(name) for name in VERSIONS_OF}
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(config).items()}
    checkpoint = None if config.ckpt is None else _sha256(config.ckpt)
    seconds = round(time.monotonic() - started, 1)
    write_json(
        config.out / "summary.json",
        {**summary, "seconds": seconds, "settings": settings, "checkpoint_sha256": checkpoint, "versions": versions},
    )
    print(format_summary(summary, config.policy))
    return summary


def summarize(rows: list[dict]) -> dict:
    """Success and approached-the-named-object rates with their 95% intervals, in all and per object."""

    def rates(group: list[dict]) -> dict:
        values: dict = {"episodes": len(group)}
        for key in ("success", "approached_named"):
            count = sum(row[key] for row in group)
            values[key] = {"count": count, "rate": count / len(group), "interval": wilson_interval(count, len(group))}
        values["mean_steps"] = float(np.mean([row["steps"] for row in group]))
        return values

    objects = sorted({row["object"] for row in rows})
    return {**rates(rows), "objects": {name: rates([row for row in rows if row["object"] == name]) for name in objects}}


def format_summary(summary: dict, policy: str) -> str:
    """The summary as a table for the terminal."""
    lines = [f"{policy:<10} {'episodes':>8}  {'success':>22}  {'named object first':>22}  {'steps':>5}"]
    for name, values in [("all", summary), *summary["objects"].items()]:
        cells = []
        for key in ("success", "approached_named"):
            low, high = values[key]["interval"]
            cells.append(f"{100 * values[key]['rate']:5.1f}% [{100 * low:5.1f}, {100 * high:5.1f}]")
        lines.append(f"{name:<10} {values['episodes']:>8}  {cells[0]:>22}  {cells[1]:>22}  {values['mean_steps']:5.0f}")
    return "\n".join(lines)


def _episodes(
    config: EvaluateConfig, env: PickPlaceEnv, planner: TrajPlanner | None
) -> Iterator[tuple[list[int], Task, Policy]]:
    """Seed, task and policy of every episode, in turn."""
    if config.policy == "replay":
        recorded = [episode for _, episode in sorted(read_dataset(config.demos)[1].items())]
        if len(recorded) < config.episodes:
            raise ValueError(f"--demos {config.demos} has {len(recorded)} recorded episodes, not {config.episodes}")
        for episode in recorded[: config.episodes]:
            yield episode.seed, Task(episode.object, episode.container), ReplayPolicy(config.demos / episode.file)
        return
    model = _model_policy(config, planner) if config.policy == "model" else None
    for index in range(config.episodes):
        seed = [config.seed, index, 0, EVALUATION_STREAM]
        if model is not None:
            policy: Policy = model
        elif config.policy == "expert":
            policy = ScriptedExpert()
        else:
            policy = RandomPolicy(np.random.default_rng([*seed, 0, 1]))
        yield seed, env.scene.tasks[index % len(env.scene.tasks)], policy


def _model_policy(config: EvaluateConfig, planner: TrajPlanner | None) -> ModelPolicy:
    if planner is None:
        from apt.infer.planner import TrajPlanner  # torch and the model's libraries: only where a model is evaluated

        planner = TrajPlanner(
            config.ckpt,
            device=config.device,
            ensemble=config.ensemble,
            use_ema=config.ema,
            seed=config.seed,
            steps=config.denoising_steps,
        )
    sampling = planner.get_config()
    looks_back = sampling.num_obs > 1 or sampling.num_history > 1
    return ModelPolicy(planner, config.execute_steps, observe_every_step=looks_back)


def _row(index: int, seed: list[int], result: EpisodeResult) -> dict:
    row = {"episode": index, "seed": "-".join(map(str, seed)), **dataclasses.asdict(result)}
    return {**row, "success": int(result.success), "approached_named": int(result.approached_named)}


def _write_csv(path: Path, rows: list[dict]) -> None:
    def write(temporary: Path) -> None:
        with open(temporary, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)

    atomic_write(path, write)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def main() -> None:
    try:
        evaluate(tyro.cli(EvaluateConfig))
    except (ValueError, FileNotFoundError, ImportError, SimulatorError) as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
