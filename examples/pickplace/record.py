"""Records demonstrations of the scripted expert as episode files.

    python -m examples.pickplace.record --out data/pickplace --episodes 100 --seed 0 --workers 2

Episode i is task i modulo the scene's tasks, and depends on (seed, i) alone. Interrupted, the same command goes on
where it stopped. Only successful episodes are kept; a failed one is tried again from another initial state.
"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

from data_utils.cli import bar, check_writable
from data_utils.files import write_json
from data_utils.h5io import EpisodeWriter
from examples.disturbance import Disturbance
from examples.errors import SimulatorError
from examples.headless import select_gl
from examples.pickplace.env import PickPlaceEnv
from examples.pickplace.expert import ScriptedExpert
from examples.pickplace.rollout import run_episode
from examples.pickplace.scene import load_scene

MAX_ATTEMPTS = 10
MAX_STEPS = 120
RECORD_STREAM = 1  # last number of every seed here, so that evaluation never meets a recorded initial state
DATASET_FILE = "dataset.json"


@dataclass(frozen=True)
class RecordConfig:
    out: Path
    """Folder for the episode files."""
    episodes: int = 100
    seed: int = 0
    workers: int = 2
    """Processes; one simulator each."""
    image_size: int = 256
    """Height and width of the recorded images."""
    scene: str = "pickplace"
    """A scene's name, or the path of a scene file."""
    disturb: float = 0.06
    """Probability per step of a push during free motion; the recorded desired poses stay clean. 0 turns it off."""
    paraphrases: int | None = None
    """Instructions per task that are stored; None: all that the scene gives."""
    max_seconds: float | None = None
    """Stop after this many seconds with as many episodes as there are by then; None: record all."""
    jpeg_quality: int = 85

    def __post_init__(self) -> None:
        for name in ("episodes", "workers", "image_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be at least 1")
        if not 0 <= self.disturb <= 1:
            raise ValueError(f"--disturb is {self.disturb}; it is a probability, between 0 and 1")

    def make_env(self) -> PickPlaceEnv:
        """This process's simulator."""
        return PickPlaceEnv(self.scene, self.image_size, self.paraphrases)

    def check(self) -> None:
        """Raises ``FileNotFoundError`` or ``ValueError`` where the scene file is missing or wrong."""
        load_scene(self.scene)

    def begin(self, env: PickPlaceEnv, seed: list[int], index: int) -> None:
        """Bring the simulator to where the recording of an episode starts."""
        env.reset_episode(seed, index)

    def settings(self) -> dict:
        """What the content of an episode depends on, besides its number."""
        names = ("seed", "image_size", "scene", "disturb", "paraphrases", "jpeg_quality")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class RecordedEpisode:
    index: int
    file: str
    seed: list[int]
    """What ``PickPlaceEnv.reset`` was given."""
    object: str
    container: str
    prompt: str
    steps: int
    attempts: int


def record_episode(env: PickPlaceEnv, config: RecordConfig, index: int) -> RecordedEpisode:
    """Records episode ``index`` into its file. Raises ``SimulatorError`` where the expert fails at every attempt."""
    path = config.out / f"episode_{index:05d}.hdf5"
    for attempt in range(MAX_ATTEMPTS):
        seed = [config.seed, index, attempt, RECORD_STREAM]
        config.begin(env, seed, index)
        disturbance = Disturbance(np.random.default_rng([*seed, 0, 1]), config.disturb)
        with EpisodeWriter(
            path, list(env.scene.cameras), 1, env.prompts, config.jpeg_quality, overwrite=True
        ) as writer:

            def add_frame(pose: np.ndarray, openness: float, writer: EpisodeWriter = writer) -> None:
                frame = env.obs_frame()
                views = {camera: frame[camera] for camera in env.scene.cameras}
                writer.add_frame(
                    frame["timestamp"],
                    frame["ee_pose"],
                    frame["gripper"],
                    images={camera: view["data"]["color"] for camera, view in views.items()},
                    world_from_cam={camera: view["data"]["wcT"] for camera, view in views.items()},
                    K={camera: view["camera"]["K"] for camera, view in views.items()},
                    world_from_ee_desired=pose[None],
                    gripper_desired=np.array([openness]),
                )

            result = run_episode(env, ScriptedExpert(), MAX_STEPS, disturbance, add_frame)
            if not result.success:
                writer.discard()
        if result.success:
            return RecordedEpisode(
                index, path.name, seed, result.object, result.container, env.prompt, result.steps, attempt + 1
            )
    raise SimulatorError(
        f"the expert failed {MAX_ATTEMPTS} times at episode {index} ({env.prompt}, scene {env.scene.name}); "
        "look at the scene's placement and grasp hints"
    )


def read_dataset(folder: Path) -> tuple[dict, dict[int, RecordedEpisode]]:
    """Settings and finished episodes by number of a recorded folder; both empty where nothing was recorded."""
    path = folder / DATASET_FILE
    if not path.is_file():
        return {}, {}
    values = json.loads(path.read_text(encoding="utf-8"))
    episodes = [RecordedEpisode(**episode) for episode in values["episodes"]]
    return values["settings"], {item.index: item for item in episodes if (folder / item.file).is_file()}


def record(config: RecordConfig) -> dict[int, RecordedEpisode]:
    """Records what is missing of ``config.episodes`` and returns all finished episodes by number.

    Raises ``ValueError`` where the folder holds episodes recorded with other settings.
    """
    started = time.monotonic()
    config.check()
    check_writable(config.out, "--out")
    select_gl()
    config.out.mkdir(parents=True, exist_ok=True)
    settings, done = read_dataset(config.out)
    if differing := [name for name, value in config.settings().items() if settings and settings.get(name) != value]:
        raise ValueError(
            f"{config.out / DATASET_FILE}: recorded with {', '.join(f'{key}={settings.get(key)}' for key in differing)}"
            "; give the same values or another --out"
        )
    missing = [index for index in range(config.episodes) if index not in done]
    skipped = config.episodes - len(missing)
    context = multiprocessing.get_context("spawn")  # an OpenGL context does not survive a fork
    workers = min(config.workers, max(1, len(missing)))
    pool = ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=(config,))
    try:
        futures = [pool.submit(_record_in_worker, index) for index in missing]
        with bar(total=config.episodes, initial=skipped, desc="recording", unit="episode") as progress:
            for future in as_completed(futures):
                if future.cancelled():
                    continue
                episode = future.result()
                done[episode.index] = episode
                _write_dataset(config, done)
                progress.update()
                if config.max_seconds is not None and time.monotonic() - started > config.max_seconds:
                    for waiting in futures:
                        waiting.cancel()
    finally:
        pool.shutdown(cancel_futures=True)
    episodes = [done[index] for index in sorted(done)]
    attempts = sum(episode.attempts for episode in episodes)
    print(
        f"{len(episodes)} episodes in {config.out} ({skipped} were there already), expert success "
        f"{len(episodes)}/{attempts}, {sum(episode.steps for episode in episodes)} steps, "
        f"{time.monotonic() - started:.0f} s"
    )
    return done


_worker_config: RecordConfig | None = None  # set once, when a worker process starts
_worker_env: PickPlaceEnv | None = None  # this process's simulator, made for its first episode


def _start_worker(config: RecordConfig) -> None:
    global _worker_config
    os.environ.setdefault("LP_NUM_THREADS", "1")  # Mesa's rasteriser: one process per core does better than threads
    _worker_config = config


def _record_in_worker(index: int) -> RecordedEpisode:
    global _worker_env
    if _worker_env is None:
        _worker_env = _worker_config.make_env()
    return record_episode(_worker_env, _worker_config, index)


def _write_dataset(config: RecordConfig, done: dict[int, RecordedEpisode]) -> None:
    values = {
        "settings": config.settings(),
        "episodes": [dataclasses.asdict(done[index]) for index in sorted(done)],
    }
    write_json(config.out / DATASET_FILE, values)


def main(kind: type[RecordConfig] = RecordConfig, module: str = "examples.pickplace.record") -> None:
    config = tyro.cli(kind, prog=f"python -m {module}")
    try:
        record(config)
    except (ValueError, FileNotFoundError, ImportError, SimulatorError) as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
