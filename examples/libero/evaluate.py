"""How often does a policy do what the instruction says? On LIBERO, LIBERO-PRO and LIBERO-plus, in the simulator.

    bash examples/libero/test_libero.sh --benchmark libero-pro --model_name apt_b16 --controller_port 9091

Per suite, ``<save_root>/<suite>_<suffix>/<model_name>.csv`` and a ``.json`` beside it; per episode, an MP4 under
``--video_root``. The same command goes on where a run was stopped.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from tqdm import tqdm

from apt.hub import located
from data_utils.cli import CommandLineError, parse
from data_utils.shards import Shard
from examples.errors import SimulatorError
from examples.headless import select_gl
from examples.libero import environment
from examples.libero.benchmarks import find_category
from examples.libero.policies import describe_policy, inability, recorded_episodes
from examples.libero.policy_settings import PolicyError, PolicySettings
from examples.libero.results import Row, SuiteResults
from examples.libero.rollout import WAIT_STEPS
from examples.libero.tasks import LiberoTask
from examples.libero.workers import Episode, EpisodeRunner, Outcome, RunStopped, check_scenes, run_episodes
from examples.libero.worklist import MAX_STEPS, SuiteWork, parse_task_ids, plan_work, suite_folder, video_file
from shm_transport import TransportError

COMMAND = "examples.libero.evaluate"
PROGRAM = "bash examples/libero/test_libero.sh"


@dataclass(frozen=True)
class EvaluateConfig:
    benchmark: Literal["libero", "libero-pro", "libero-plus"] = "libero"
    suites: tuple[str, ...] = ()
    """Suites, separated by spaces; none: those that the benchmark reports."""
    policy: Literal["model", "expert", "replay", "random"] = "model"
    """The model, or a sanity baseline: scripted and privileged, recorded desired poses, chance."""
    model_name: str = ""
    """Names the result files; by default the policy's name."""
    controller_name: str = "control"
    """Name of the policy service (apt.infer.remote_service --uri)."""
    controller_host: str = "localhost"
    """Where its name server runs."""
    controller_port: int = 9091
    ckpt: Path | None = None
    """Plan with this checkpoint in the simulator's own process, without a service."""
    ensemble: int = 4
    """Of --ckpt: trajectories that are blended."""
    ema: bool = False
    """Of --ckpt: use the averaged weights."""
    denoising_steps: int | None = None
    """Of --ckpt; by default 20."""
    demos: Path | None = None
    """Folder of recorded episodes, for --policy replay."""
    num_trials_per_task: int | None = None
    """Episodes per task; by default the benchmark's: 50, on LIBERO-plus 1."""
    task_ids: str = ""
    """Tasks of every suite, with commas, ranges with a hyphen: 0,3,10-20; by default all."""
    categories: tuple[str, ...] = ()
    """Of LIBERO-plus, the tasks with these changes: camera, robot, language, light, background, sensor, objects."""
    begin_task_id: int = 0
    """The first task."""
    all: bool = True
    """All tasks from the first on; --no-all: that one alone."""
    max_steps: int | Literal["peers"] = MAX_STEPS
    """Control steps after which an episode has failed; peers: the published caps (220 spatial, 280 object, 300 goal,
    520 libero_10)."""
    execute_steps: int = 3
    """Control steps between two queries."""
    seed: int = 0
    image_size: int = 256
    num_workers: int = 1
    """Simulator processes."""
    gpu: int = 0
    """That renders, where MUJOCO_GL is egl, and that --ckpt runs on."""
    save_root: Path | None = None
    """Folder of the results; by default results/<benchmark>, since LIBERO's and LIBERO-plus's suites have one name."""
    video_root: Path | None = None
    """Folder of the videos; by default results/<benchmark>_videos."""
    suffix: str = ""
    """Of the folders below both."""
    save: bool = True
    """Write results."""
    video: bool = True
    """Write an MP4 per episode."""
    video_every: int | None = None
    """Control steps between two frames of a video; by default --execute_steps, so that what a query saw is shown."""
    conti: bool = True
    """Go on with results that are there; --no-conti: move them aside and begin anew."""
    shard: str | None = None
    """Run part I of N of each suite's episodes alone, 0/4 to 3/4 for instance; the same command without it takes up all
    parts and runs what is missing."""
    assets_label: str = "LIBERO"
    """Written into the results: which meshes and textures were used."""

    def __post_init__(self) -> None:
        for name, default in self.default_roots.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, default)
        counts = {"execute_steps": 1, "image_size": 16, "num_workers": 1, "begin_task_id": 0, "seed": 0, "gpu": 0}
        counts |= {"num_trials_per_task": 1, "video_every": 1, "max_steps": 1, "ensemble": 0, "denoising_steps": 1}
        for name, least in counts.items():
            value = getattr(self, name)
            if isinstance(value, int) and value < least:
                raise ValueError(f"--{name} is {value}; it must be at least {least}")
        parse_task_ids(self.task_ids)
        if Shard.parse(self.shard) is not None and not self.save:
            raise ValueError("--shard is for results that are put together; leave out --no-save")
        if self.task_ids and (self.begin_task_id or not self.all):
            raise ValueError("--task_ids names the tasks; leave out --begin_task_id and --no-all")
        if self.categories and self.benchmark != "libero-plus":
            raise ValueError("--categories are LIBERO-plus's; add --benchmark libero-plus")
        for name in self.categories:
            find_category(name)
        if (self.policy == "replay") != (self.demos is not None):
            raise ValueError("--policy replay and --demos DIR, recorded episodes, belong together")
        if self.ckpt is None:
            for name in ("ensemble", "ema", "denoising_steps"):
                if getattr(self, name) != type(self).__dataclass_fields__[name].default:
                    raise ValueError(f"--{name} belongs to --ckpt; a service is told when it is started")
        elif self.policy != "model":
            raise ValueError("--ckpt is a model's")
        else:
            object.__setattr__(self, "ckpt", located(self.ckpt))
            if not self.ckpt.exists():
                raise ValueError(f"--ckpt {self.ckpt}: no such file")
        if self.policy == "model" and not self.model_name:
            raise ValueError("--model_name is missing: it names the result files")

    @property
    def default_roots(self) -> dict[str, Path]:
        results = Path("results")
        return {"save_root": results / self.benchmark, "video_root": results / f"{self.benchmark}_videos"}

    @property
    def name(self) -> str:
        return self.model_name or self.policy

    def policy_settings(self) -> PolicySettings:
        return PolicySettings(
            self.policy,
            self.controller_name,
            self.controller_host,
            self.controller_port,
            self.ckpt,
            self.gpu,
            self.ensemble,
            self.ema,
            self.denoising_steps,
            self.demos,
        )


@dataclass(frozen=True)
class Prepared:
    """A run that can begin."""

    work: list[SuiteWork]
    policy: dict
    """What is known of the policy."""
    versions: dict[str, str]


def prepare(config: EvaluateConfig) -> Prepared:
    """Find suites, episodes and policy, and say what is left out.

    Raises:
        SimulatorError, ImportError, PolicyError, TransportError, DataError: what is wrong, before anything is run.
    """
    environment.check_assets(config.benchmark)
    policy = config.policy_settings()
    recorded = recorded_episodes(policy)
    ids = parse_task_ids(config.task_ids)
    last = None if config.all else config.begin_task_id + 1
    work = plan_work(
        config.benchmark,
        [name for names in config.suites for name in names.split()],
        ids or slice(config.begin_task_id, last),
        config.num_trials_per_task,
        config.seed,
        config.max_steps,
        recorded,
        {find_category(name) for name in config.categories},
        lambda task: inability(policy, task),
    )
    skipped = [why for suite in work for why in suite.skipped.values()]
    if skipped and not any(suite.episodes for suite in work):
        raise SimulatorError(f"none of these tasks can be run ({skipped[0]}); choose others, or other --suites")
    described = describe_policy(policy)
    if config.video or config.policy == "model":
        os.environ["MUJOCO_EGL_DEVICE_ID"] = str(config.gpu)
        select_gl()
    versions = environment.versions(config.benchmark)
    for line in [*_warnings(work), *environment.unpinned(versions)]:
        print(line, file=sys.stderr)
    return Prepared(work, described, versions)


def evaluate(config: EvaluateConfig) -> list[tuple[str, Counter[bool]]]:
    """Run what is missing; returns each suite's outcomes, those of earlier runs included; of a part, its own.

    Raises:
        ResultsError: results that cannot be gone on with; and what :func:`prepare` raises.
        SimulatorError: no task's scene loads, and there are no results of any; tasks besides others are left out.
        RunStopped: an episode could not be run; what was finished is kept.
    """
    prepared, shard = prepare(config), Shard.parse(config.shard)
    work = prepared.work
    if shard is not None:
        for suite in work:
            suite.episodes = [episode for number, episode in enumerate(suite.episodes) if shard.owns(number)]
    outcomes = [(suite.suite, Counter[bool]()) for suite in work]
    tallies = dict(outcomes)
    with ExitStack() as stack:
        results: dict[str, SuiteResults] = {}
        if config.save:
            for suite in work:
                folder = suite_folder(config.save_root, suite.suite, config.suffix)
                settings = outcome_settings(config, suite, prepared)
                about = {"model": config.name, "whole_suite": suite.whole, "skipped_tasks": suite.skipped}
                opened = SuiteResults(folder, config.name, settings, about, config.conti, shard)
                results[suite.suite] = stack.enter_context(opened)
        planned = {suite.suite: suite for suite in work}
        left_out: list[str] = []

        def leave_out(task: LiberoTask, why: str) -> None:
            if task.task_id not in (skipped := planned[task.suite].skipped):
                skipped[task.task_id] = why
                left_out.append(why)
                tqdm.write(_left_out(task.suite, task.task_id, why), file=sys.stderr)
                if task.suite in results:
                    results[task.suite].write()

        todo: list[Episode] = []
        for episode in (episode for suite in work for episode in suite.episodes):
            suite, key = episode.key.suite, (episode.key.task_id, episode.key.episode_id)
            if suite in results and key in results[suite]:
                tallies[suite][results[suite].rows[key].success] += 1
                continue
            if config.video:
                path = video_file(config.video_root, suite, config.suffix, config.name, episode.key)
                episode = replace(episode, video=path)
            todo.append(episode)

        begun = {episode.task.suite: episode.task for episode in reversed(todo)}
        if len(begun) > 1:  # with a single suite, the first episode tells at once
            for task, why in check_scenes(begun.values()).items():
                leave_out(task, why)
            todo = [episode for episode in todo if episode.key.task_id not in planned[episode.key.suite].skipped]

        def note(episode: Episode, outcome: Outcome) -> None:
            key, result = episode.key, outcome.result
            tallies[key.suite][result.success] += 1
            if key.suite in results:
                row = Row(key.task_id, key.episode_id, result.success, episode.instruction)
                results[key.suite].add(
                    row,
                    task=episode.task.name,
                    steps=result.steps,
                    queries=result.queries,
                    seconds=round(outcome.seconds, 2),
                    ee_end=[round(float(value), 6) for value in result.ee_path[-1]],
                    seeds={purpose: key.derived_seed(purpose) for purpose in ("scene", "policy")},
                )

        runner = EpisodeRunner(
            config.policy_settings(),
            config.execute_steps,
            config.image_size,
            config.video_every or config.execute_steps,
        )
        run_episodes(runner, todo, config.num_workers, note, sum(tallies.values(), Counter()), leave_out)
        for opened in results.values():
            opened.write()  # also where nothing was missing: repaired, and with this run's remarks
    if left_out:
        if not any(tallies.values()):
            raise SimulatorError(f"no task's scene loads ({len(left_out)} were tried); the first: {left_out[0]}")
        what = "left out of the results, since their scenes do not load"
        print(f"warning: tasks {what}: {len(left_out)}; the same command tries them again", file=sys.stderr)
    return outcomes


def _warnings(work: list[SuiteWork]) -> list[str]:
    skipped = [(suite.suite, task, why) for suite in work for task, why in suite.skipped.items()]
    lines = [_left_out(*told) for told in skipped]
    return [*lines, f"warning: tasks left out of the results: {len(skipped)}"] if skipped else []


def _left_out(suite: str, task_id: int, why: str) -> str:
    return f"warning: {suite} task {task_id} is left out: {why}"


def outcome_settings(config: EvaluateConfig, suite: SuiteWork, prepared: Prepared) -> dict:
    """What outcomes depend on."""
    return {
        "benchmark": config.benchmark,
        "suite": suite.suite,
        "policy": prepared.policy,
        "max_steps": suite.max_steps,
        "execute_steps": config.execute_steps,
        "wait_steps": WAIT_STEPS,
        "seed": config.seed,
        "image_size": config.image_size,
        "assets": config.assets_label,
        "versions": prepared.versions,
    }


def run_command(
    argv: Sequence[str], into: type[EvaluateConfig], command: str, program: str, about: str, act: Callable
) -> int:
    """Parse flags, go on in LIBERO's environment, and ``act`` on the configuration, which prints what came out.

    Exit code: 0 after a whole run, 1 where it stopped, 2 where it did not begin, 130 after Ctrl-C.
    """
    try:
        config = parse(into, argv, program, about)
        environment.enter_libero(command)
        act(config)
    except RunStopped as error:
        print(f"stopped: {error}\nwhat was finished is kept; {error.remedy}", file=sys.stderr)
        return 1
    except (
        CommandLineError,
        ValueError,
        SimulatorError,
        ImportError,
        PolicyError,
        TransportError,
    ) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from there", file=sys.stderr)
        return 130
    return 0


def _evaluate_and_print(config: EvaluateConfig) -> None:
    for suite, counts in evaluate(config):
        rate = f"{100 * counts[True] / counts.total():.1f}%" if counts else "nothing to run"
        print(f"{suite}: {counts[True]}/{counts.total()} {rate}")


def main(argv: Sequence[str]) -> int:
    return run_command(argv, EvaluateConfig, COMMAND, PROGRAM, __doc__, _evaluate_and_print)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
