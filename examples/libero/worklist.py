"""Which episodes an evaluation consists of."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from examples.errors import SimulatorError
from examples.libero.benchmarks import find_benchmark
from examples.libero.rollout import EpisodeKey
from examples.libero.tasks import LiberoTask, suite_tasks
from examples.libero.workers import Episode

MAX_STEPS = 500
# Step caps of published evaluations, by what a suite's name begins with.
PEERS_MAX_STEPS = {
    "libero_spatial": 220,
    "libero_object": 280,
    "libero_goal": 300,
    "libero_10": 520,
    "libero_90": 400,
}


@dataclass
class SuiteWork:
    """What is to be run of a suite."""

    suite: str
    max_steps: int
    whole: dict[str, int] = field(default_factory=dict)
    """What the whole suite has: ``tasks``, and ``episodes`` per task, as the benchmark reports them."""
    episodes: list[Episode] = field(default_factory=list)
    skipped: dict[int, str] = field(default_factory=dict)
    """Task id -> why the task is not run: as its package ships it, or with the assets that are there, it cannot be."""


def step_cap(suite: str, max_steps: int | str) -> int:
    """Control steps that an episode of a suite may take; ``max_steps`` is a number or "peers".

    Raises ``SimulatorError`` for a suite that peers have no cap for.
    """
    if max_steps != "peers":
        return int(max_steps)
    for name, cap in PEERS_MAX_STEPS.items():
        if suite == name or suite.startswith(f"{name}_"):
            return cap
    raise SimulatorError(f"no published step cap is known for the suite {suite!r}; give --max_steps a number")


def plan_work(
    benchmark: str,
    suites: Sequence[str],
    task_ids: slice | Sequence[int],
    trials: int | None,
    seed: int,
    max_steps: int | str,
    recorded: Mapping[str, Mapping[int, Sequence[int]]] | None = None,
    categories: Collection[str] = (),
    inability: Callable[[LiberoTask], str | None] = lambda task: None,
) -> list[SuiteWork]:
    """The episodes of a run, suite by suite.

    Args:
        benchmark: a key of ``BENCHMARKS``.
        suites: by name; none: those that are reported.
        task_ids: which of each suite's tasks: a slice, or their numbers.
        trials: episodes per task; None: as many as the benchmark has, fewer where fewer initial states are stored.
        seed: of the run.
        max_steps: a number or "peers".
        recorded: suite -> task id -> episode ids, where episodes are not begun at stored initial states.
        categories: of LIBERO-plus, what the tasks have changed; none: anything.
        inability: why the policy is not asked to do a task, None where it is.
    Raises:
        SimulatorError: a suite or a task that is not there, more trials than a task has initial states.
    """
    found = []
    for suite in suites or find_benchmark(benchmark).suites:
        tasks = suite_tasks(suite, benchmark)
        work = SuiteWork(
            suite, step_cap(suite, max_steps), {"tasks": len(tasks), "episodes": find_benchmark(benchmark).trials}
        )
        for task in _chosen(suite, tasks, task_ids, categories):
            if (fault := task.fault or inability(task)) is not None:
                work.skipped[task.task_id] = fault
                continue
            for number in _episode_ids(task, trials, recorded):
                key = EpisodeKey(suite, task.task_id, number, seed)
                work.episodes.append(Episode(key, task, task.language, work.max_steps))
        found.append(work)
    return found


def parse_task_ids(text: str) -> tuple[int, ...]:
    """Numbers from "0,3,10-20", each once, in that order. Raises ``ValueError`` for anything else."""
    ids: dict[int, None] = {}
    for part in text.split(",") if text else ():
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if last < first:
            raise ValueError(f"--task_ids {text!r}: wanted numbers with commas and ranges, as 0,3,10-20")
        ids |= dict.fromkeys(range(first, last + 1))
    return tuple(ids)


def _chosen(
    suite: str, tasks: Sequence[LiberoTask], task_ids: slice | Sequence[int], categories: Collection[str]
) -> list[LiberoTask]:
    if isinstance(task_ids, slice):
        if not tasks[task_ids]:
            raise SimulatorError(f"{suite} has tasks 0 to {len(tasks) - 1}; lower --begin_task_id {task_ids.start}")
        chosen = tasks[task_ids]
    else:
        if max(task_ids) >= len(tasks):
            raise SimulatorError(f"{suite} has tasks 0 to {len(tasks) - 1}, and none {max(task_ids)}; see --task_ids")
        chosen = [tasks[number] for number in sorted(task_ids)]
    if not categories:
        return list(chosen)
    chosen = [task for task in chosen if (changed := task.perturbation) is not None and changed.category in categories]
    if not chosen:
        raise SimulatorError(f"none of the chosen tasks of {suite} is of the categories {', '.join(categories)}")
    return chosen


def video_file(root: Path, suite: str, suffix: str, model: str, key: EpisodeKey) -> Path:
    return suite_folder(root, suite, suffix) / model / f"task{key.task_id:03d}" / f"ep{key.episode_id:03d}.mp4"


def suite_folder(root: Path, suite: str, suffix: str) -> Path:
    return root / (f"{suite}_{suffix}" if suffix else suite)


def _episode_ids(
    task: LiberoTask, trials: int | None, recorded: Mapping[str, Mapping[int, Sequence[int]]] | None
) -> Iterator[int]:
    if recorded is not None:
        ids = sorted(recorded.get(task.suite, {}).get(task.task_id, ()))
        yield from ids if trials is None else ids[:trials]
        return
    stored = len(task.initial_states())
    if trials is None:
        trials = min(find_benchmark(task.benchmark).trials, stored)
    if trials > stored:
        raise SimulatorError(
            f"{task.suite} task {task.task_id} has {stored} initial states; lower --num_trials_per_task {trials}"
        )
    yield from range(trials)
