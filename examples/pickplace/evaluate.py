"""Runs a policy in closed loop in the simulator and reports how often it does what the instruction says.

    python -m examples.pickplace.evaluate --ckpt runs/stage2/ckpt_latest.pt --episodes 20 --out results/pickplace

Written into ``--out``: ``episodes.csv``, ``summary.json`` and, with ``--video``, an MP4 per episode. Stopped, the same
command goes on with the episodes that are missing.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import hashlib
import importlib.metadata
import multiprocessing
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import tyro

from apt.hub import located
from data_utils.cli import bar, check_writable, cores
from data_utils.drawing.mp4 import VideoWriter
from data_utils.files import atomic_write, read_json, write_json
from data_utils.shards import Shard
from data_utils.words import describe_differences
from examples.errors import SimulatorError
from examples.pickplace.env import PickPlaceEnv
from examples.pickplace.expert import ScriptedExpert
from examples.pickplace.policies import ModelPolicy, RandomPolicy, ReplayPolicy
from examples.pickplace.record import read_dataset
from examples.pickplace.rollout import Policy, run_episode
from examples.pickplace.scene import load_scene
from examples.pickplace.video import episode_view
from examples.statistics import wilson_interval

if TYPE_CHECKING:
    from apt.infer.planner import TrajPlanner

EVALUATION_STREAM = 2  # last number of every seed here: initial states that no recording has
CSV_FILE, SETTINGS_FILE = "episodes{}.csv", "settings.json"  # {}: a part's suffix
VERSIONS_OF = ("robosuite", "mujoco", "numpy", "torch")


@dataclass(frozen=True)
class ClosedLoopConfig(ABC):
    """What every evaluation in closed loop is told, whatever its world."""

    out: Path
    """Folder for the results."""
    ckpt: Path | None = None
    """Checkpoint of the model; needed by --policy model."""
    policy: Literal["model", "expert", "replay", "random"] = "model"
    episodes: int = 20
    seed: int = 0
    workers: int = 1
    """Processes; a simulator and a model each. Results do not depend on it."""
    execute_steps: int = 8
    """Control steps between two queries of the model."""
    settle_steps: int = 0
    """Control steps that a trajectory is followed on after the gripper has begun to open."""
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
    overwrite: bool = False
    """Begin anew where --out holds results of other settings; else that is refused."""
    shard: str | None = None
    """Run part I of N of the episodes alone, 0/4 to 3/4 for instance; the same command without it takes up all parts,
    runs what is missing, and sums up."""

    def __post_init__(self) -> None:
        if (part := Shard.parse(self.shard)) is not None and part.index >= self.episodes:
            raise ValueError(f"--shard {self.shard} has none of {self.episodes} episodes; make fewer parts")
        for name in ("episodes", "workers", "execute_steps", "max_steps", "image_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be at least 1")
        if self.ckpt is not None:
            object.__setattr__(self, "ckpt", located(self.ckpt))
        for policy, name, path in (("model", "ckpt", self.ckpt), ("replay", "demos", self.demos)):
            if self.policy == policy and (path is None or not path.exists()):
                raise ValueError(f"--policy {policy} needs an existing --{name}; given: {path}")

    @abstractmethod
    def make_env(self) -> PickPlaceEnv:
        """This process's simulator. Raises ``FileNotFoundError`` or ``ValueError`` for a wrong world."""

    def settings(self) -> dict:
        """What an episode's result depends on, besides its number, as JSON holds it."""
        elsewhere = ("out", "episodes", "workers", "video", "device", "overwrite", "shard")
        values = {name: value for name, value in vars(self).items() if name not in elsewhere}
        return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}


@dataclass(frozen=True)
class EvaluateConfig(ClosedLoopConfig):
    scene: str = "pickplace"
    setting: str | None = None
    """One of the scene file's settings, e.g. UO of --scene trays; None: the scene's own tasks."""
    paraphrases: int | None = None
    """Instructions are drawn from each task's first so many; None: from all."""

    def make_env(self) -> PickPlaceEnv:
        scene = load_scene(self.scene)
        if self.setting is not None:
            scene = scene.in_setting(self.setting)
        return PickPlaceEnv(scene, self.image_size, self.paraphrases)


def evaluate(config: ClosedLoopConfig, planner: TrajPlanner | None = None) -> dict:
    """Runs the episodes that are missing, writes the results and returns the summary; of a part, its own alone.

    ``planner`` is of ``config.ckpt``, where that is loaded already; with it, everything happens in this process.

    Raises ``ValueError`` where ``config.out`` holds results of other settings.
    """
    started = time.monotonic()
    check_writable(config.out, "--out")
    part = Shard.parse(config.shard)
    rows = _take_up(config)
    if part is not None:
        rows = {index: row for index, row in rows.items() if part.owns(index)}
    asked = [index for index in range(config.episodes) if part is None or part.owns(index)]
    missing = [index for index in asked if index not in rows]
    file = config.out / CSV_FILE.format("" if part is None else part.suffix)
    with bar(total=len(asked), initial=len(asked) - len(missing), unit="episode") as progress:
        for row in _run(config, missing, planner):
            rows[row["episode"]] = row
            _write_csv(file, [rows[index] for index in sorted(rows)])
            progress.update()
            progress.set_postfix_str(f"{sum(int(row['success']) for row in rows.values())} of {len(rows)} succeed")
    summary = summarize([rows[index] for index in asked])
    if part is None:
        _write_summary(config, rows, summary, started)
    print(format_summary(summary, config.policy))
    return summary


def _write_summary(config: ClosedLoopConfig, rows: dict[int, dict], summary: dict, started: float) -> None:
    """Of all episodes; what parts have left is in one file then."""
    _write_csv(config.out / CSV_FILE.format(""), [rows[index] for index in sorted(rows)])
    for file in config.out.glob(CSV_FILE.format(".*_of_*")):
        file.unlink()
    versions = {name: importlib.metadata.version(name) for name in VERSIONS_OF}
    seconds = round(time.monotonic() - started, 1)
    settings = read_json(config.out / SETTINGS_FILE)
    write_json(config.out / "summary.json", {**summary, "seconds": seconds, **settings, "versions": versions})


def _take_up(config: ClosedLoopConfig) -> dict[int, dict]:
    """Rows of episodes that are done already, by number. Raises ``ValueError`` where they are of other settings."""
    now = {"settings": config.settings(), "checkpoint_sha256": None if config.ckpt is None else _digest(config.ckpt)}
    file = config.out / SETTINGS_FILE
    begun = read_json(file) if file.is_file() else now
    if begun != now and not config.overwrite:
        what = describe_differences(begun, now)
        raise ValueError(f"{config.out} holds results of other settings ({what}); name another --out, or --overwrite")
    config.out.mkdir(parents=True, exist_ok=True)
    write_json(file, now)
    if begun != now:
        for results in config.out.glob(CSV_FILE.format("*")):
            results.unlink()
    return {row["episode"]: row for row in read_rows(config.out)}


def read_rows(out: Path) -> list[dict]:
    """Of the episodes that are done, in order: fields of :class:`examples.pickplace.rollout.EpisodeResult`,
    ``episode``, ``seed`` and ``approached_named``; flags are 0 or 1."""
    found = {}
    for results in out.glob(CSV_FILE.format("*")):  # also of parts
        with open(results, newline="", encoding="utf-8") as rows:
            found |= {row["episode"]: row for row in map(_parsed, csv.DictReader(rows))}
    return [found[episode] for episode in sorted(found)]


def _run(config: ClosedLoopConfig, indices: list[int], planner: TrajPlanner | None) -> Iterator[dict]:
    """A row per episode, in the order in which they are done."""
    workers = min(config.workers, len(indices))
    if planner is not None or workers <= 1:
        with contextlib.closing(_Runner(config, planner)) as runner:
            yield from map(runner.run, indices)
        return
    context = multiprocessing.get_context("spawn")  # an OpenGL context does not survive a fork
    pool = ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=(config, cores() // workers))
    try:
        for done in as_completed([pool.submit(_run_in_worker, index) for index in indices]):
            yield done.result()
    finally:
        pool.shutdown(cancel_futures=True)


_worker_runner: _Runner | None = None  # this process's simulator and model


def _start_worker(config: ClosedLoopConfig, threads: int) -> None:
    global _worker_runner
    os.environ.setdefault("LP_NUM_THREADS", "1")  # Mesa's rasteriser: one process per core does better than threads
    _worker_runner = _Runner(config, None, max(1, threads))


def _run_in_worker(index: int) -> dict:
    return _worker_runner.run(index)


class _Runner:
    """One process's simulator, and its model where there is one, made for the first episode."""

    def __init__(self, config: ClosedLoopConfig, planner: TrajPlanner | None, threads: int | None = None) -> None:
        self._config, self._planner, self._threads = config, planner, threads
        self._env: PickPlaceEnv | None = None
        self._recorded = []
        if config.policy == "replay":
            self._recorded = [episode for _, episode in sorted(read_dataset(config.demos)[1].items())]
            if len(self._recorded) < config.episodes:
                raise ValueError(
                    f"--demos {config.demos} has {len(self._recorded)} recorded episodes, not {config.episodes}"
                )

    def run(self, index: int) -> dict:
        """The row of episode ``index``."""
        config = self._config
        if self._env is None:
            self._env = config.make_env()
        env, seed = self._env, [config.seed, index, 0, EVALUATION_STREAM]
        if self._recorded:
            episode = self._recorded[index]
            env.reset_episode(episode.seed, episode.index)
        else:
            env.reset_episode(seed, index)
        policy = self._policy(index, seed)
        path = config.out / "videos" / f"episode_{index:03d}.mp4"
        with VideoWriter(path) if config.video else contextlib.nullcontext() as writer:

            def add_to_video(pose: np.ndarray, openness: float) -> None:
                if writer is not None:
                    next_step = np.stack([env.world_from_ee, pose])
                    writer.add(episode_view(env, next_step if policy.path is None else policy.path))

            result = run_episode(env, policy, config.max_steps, on_step=add_to_video)
        row = {"episode": index, "seed": "-".join(map(str, seed)), **dataclasses.asdict(result)}
        return {**row, "success": int(result.success), "approached_named": int(result.approached_named)}

    def close(self) -> None:
        if self._env is not None:
            self._env.close()

    def _policy(self, index: int, seed: list[int]) -> Policy:
        config = self._config
        if config.policy == "replay":
            return ReplayPolicy(config.demos / self._recorded[index].file)
        if config.policy == "expert":
            return ScriptedExpert()
        if config.policy == "random":
            return RandomPolicy(np.random.default_rng([*seed, 0, 1]))
        if self._planner is None:
            self._planner = self._load()
        sampling = self._planner.get_config()
        looks_back = sampling.num_obs > 1 or sampling.num_history > 1
        noise = int(np.random.SeedSequence([*seed, 0, 2]).generate_state(1)[0])
        return ModelPolicy(self._planner, config.execute_steps, looks_back, noise, config.settle_steps)

    def _load(self) -> TrajPlanner:
        import torch  # and the model's libraries: only where a model is evaluated

        from apt.infer.planner import TrajPlanner

        if self._threads is not None:
            torch.set_num_threads(self._threads)
        config = self._config
        return TrajPlanner(
            config.ckpt,
            device=config.device,
            ensemble=config.ensemble,
            use_ema=config.ema,
            steps=config.denoising_steps,
        )


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


def _parsed(row: dict[str, str]) -> dict:
    """A row of the CSV file as it was written."""
    numbers = ("episode", "success", "approached_named", "steps")
    return {name: int(value) if name in numbers else value or None for name, value in row.items()}


def _write_csv(path: Path, rows: list[dict]) -> None:
    def write(temporary: Path) -> None:
        with open(temporary, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)

    atomic_write(path, write)


def _digest(path: Path) -> str:
    """SHA-256 of a checkpoint: of a file, or of an exported folder's files."""
    digest = hashlib.sha256()
    for file in sorted(path.iterdir()) if path.is_dir() else [path]:
        with open(file, "rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def main() -> None:
    try:
        evaluate(tyro.cli(EvaluateConfig, prog="python -m examples.pickplace.evaluate"))
    except (ValueError, FileNotFoundError, ImportError, SimulatorError) as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
