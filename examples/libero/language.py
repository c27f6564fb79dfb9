"""Does a policy do what it is told? The instruction is swapped for another task's of the same scene.

    python -m examples.libero.language --model_name apt_b16 --suites libero_goal --num_trials_per_task 5

Every episode is run three times from the same state: as told by its task; as told by another task; and as told by its
task again, with other noise in the policy. Reported, per suite and model:

- ``true``: success as told by the task.
- ``ignored``: how often the task is done although another one was asked for. A policy that ignores its instruction
  does it as often as when it is told to.
- ``followed``: how often the task that was asked for instead is done, where its goal can be reached in the scene.
- ``score`` = true - ignored: 0 for a policy that ignores its instruction, 1 for one that does as it is told.
- ``change``: mean distance (m) between the end-effector's paths under the two instructions, at the same time, over the
  steps that both have; ``repeat``: the same between the two runs under one instruction. ``ratio`` is change over
  repeat, the latter counted as at least 1 mm: about 1 where only noise tells the runs apart.

The other task is drawn, for each episode, from those of the suite whose goal can be checked in the scene, and from all
others where there is none (libero_spatial: there is no bowl where another task looks for it).
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from examples.errors import SimulatorError
from examples.libero.evaluate import EvaluateConfig, prepare, run_command
from examples.libero.summary_tables import Cell, percent
from examples.libero.tasks import LiberoTask, suite_tasks
from examples.libero.trials import Stage, Trial, doable, others_in_scene, run_trials
from examples.libero.workers import Episode

COMMAND = "examples.libero.language"
LEAST_REPEAT = 1e-3  # m
TRUE, SWAPPED, REPEATED = "true", "swapped", "repeated"


@dataclass(frozen=True)
class LanguageConfig(EvaluateConfig):
    video: bool = field(default=False)
    """Write an MP4 per episode."""

    @property
    def default_roots(self) -> dict[str, Path]:
        return super().default_roots | {"save_root": Path("results") / f"{self.benchmark}_language"}


@dataclass(frozen=True)
class Score:
    """Of one suite; see the module's text."""

    true: Cell
    ignored: Cell
    followed: Cell | None
    """None where no other task can be checked in the scenes."""
    change: float
    repeat: float

    @property
    def score(self) -> float:
        return self.true.rate - self.ignored.rate

    @property
    def ratio(self) -> float:
        return self.change / max(self.repeat, LEAST_REPEAT)


def other_task(episode: Episode, tasks: Sequence[LiberoTask]) -> tuple[LiberoTask, bool]:
    """The task whose instruction an episode is given instead of its own, and whether its goal can be checked.

    Raises ``SimulatorError`` where the suite has no task with another instruction.
    """
    checkable = others_in_scene(episode.task, tasks)
    others = checkable or [task for task in tasks if not task.fault and task.language != episode.task.language]
    if not others:
        raise SimulatorError(f"{episode.task.suite} has no task with another instruction than {episode.task.name}'s")
    return others[episode.key.derived_seed("other instruction") % len(others)], bool(checkable)


def trials(episodes: Iterable[Episode], tasks: Sequence[LiberoTask]) -> dict[str, list[Trial]]:
    """The three runs of each episode, by kind."""
    made: dict[str, list[Trial]] = {TRUE: [], SWAPPED: [], REPEATED: []}
    for episode in episodes:
        key, task = episode.key, episode.task
        goal, row = task.problem.goal, (key.task_id, key.episode_id)
        told = (Stage(task.language, (goal,)),)
        common = {"task": task, "instruction": task.language, "max_steps": episode.max_steps, "row": row}
        made[TRUE].append(Trial(key, **common, stages=told, watched=(goal,), wanted=(0,)))
        again = replace(key, repeat=1)
        made[REPEATED].append(Trial(again, **common, stages=told, watched=(goal,), wanted=(0,)))
        other, checkable = other_task(episode, tasks)
        goals = (goal, other.problem.goal) if checkable else (goal,)
        swapped = common | {"instruction": other.language, "stages": (Stage(other.language, goals),)}
        # A success is to have done what was asked for; where that cannot be checked, nothing is wanted.
        wanted = (1,) if checkable else ()
        about = (("other", other.name), ("checkable", checkable))
        made[SWAPPED].append(Trial(key, **swapped, watched=goals, wanted=wanted, about=about))
    return made


def path_distance(one: Sequence[Sequence[float]], other: Sequence[Sequence[float]]) -> float:
    """Mean distance (m) between paths (N, 3) and (M, 3) at the same times, over those that both have."""
    both = min(len(one), len(other))
    return float(np.linalg.norm(np.array(one[:both]) - np.array(other[:both]), axis=1).mean())


def score(groups: dict[str, list[dict[str, Any]]]) -> Score:
    """From what :func:`run_trials` knows of a suite's episodes."""
    true, swapped, repeated = (
        {(run["task_id"], run["episode_id"]): run for run in groups[kind]} for kind in (TRUE, SWAPPED, REPEATED)
    )
    checkable = [run for run in swapped.values() if run["checkable"]]
    return Score(
        _share([run["ever"][0] for run in true.values()]),
        _share([run["ever"][0] for run in swapped.values()]),
        _share([run["ever"][1] for run in checkable]) if checkable else None,
        float(np.mean([path_distance(run["path"], swapped[key]["path"]) for key, run in true.items()])),
        float(np.mean([path_distance(run["path"], repeated[key]["path"]) for key, run in true.items()])),
    )


def format_scores(scores: dict[str, Score]) -> str:
    head = (
        f"{'':20} {'true':>20} {'ignored':>20} {'followed':>20} {'score':>6} {'change':>8} {'repeat':>8} {'ratio':>6}"
    )
    lines = [head]
    for suite, of in scores.items():
        followed = percent(of.followed) if of.followed is not None else "not checkable"
        numbers = f"{of.score:6.2f} {1000 * of.change:5.0f} mm {1000 * of.repeat:5.0f} mm {of.ratio:6.1f}"
        lines.append(f"{suite:20} {percent(of.true):>20} {percent(of.ignored):>20} {followed:>20} {numbers}")
    return "\n".join(lines)


def measure(config: LanguageConfig) -> dict[str, Score]:
    """Run what is missing; suite -> score. Raises what ``evaluate.prepare`` and ``run_trials`` raise."""
    prepared = prepare(config)
    scores = {}
    for suite in prepared.work:
        tasks = doable(config, suite_tasks(suite.suite, config.benchmark))
        groups = trials([episode for episode in suite.episodes if episode.task in tasks], tasks)
        scores[suite.suite] = score(run_trials(config, prepared, suite, groups))
    return scores


def _share(outcomes: Sequence[bool]) -> Cell:
    return Cell(sum(outcomes) / len(outcomes), len(outcomes))


def main(argv: Sequence[str]) -> int:
    def act(config: LanguageConfig) -> None:
        print(format_scores(measure(config)))

    return run_command(argv, LanguageConfig, COMMAND, f"python -m {COMMAND}", __doc__, act)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
