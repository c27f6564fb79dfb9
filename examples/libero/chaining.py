"""Two tasks of a scene, one after the other: told one by one (coaching), or in one sentence (chaining).

    python -m examples.libero.chaining --model_name apt_b16 --suites libero_goal --pairs 10 --num_trials_per_task 5

Coaching sends the first task's instruction until its goal holds or ``--max_steps`` have passed, then the second's, for
as many steps. Chaining sends "<first> and then <second>" once, for twice as many. Reported: how often the first task's
goal held at some step, how often the second's, and how often both hold at the end.

A pair is two tasks of a suite that can be done in one scene, that of the first: all that the second goal is about is
there, and no thing is to be in two places. Episodes begin at the first task's stored initial states.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

from examples.errors import SimulatorError
from examples.libero.evaluate import EvaluateConfig, prepare, run_command
from examples.libero.expert import THEN
from examples.libero.summary_tables import Cell, percent
from examples.libero.tasks import LiberoTask, suite_tasks
from examples.libero.trials import Stage, Trial, doable, others_in_scene, run_trials
from examples.libero.workers import Episode

COMMAND = "examples.libero.chaining"
COACHING, CHAINING = "coaching", "chaining"
PAIR = 1000  # in the results' numbers: task 3004 is task 3 and then task 4
PARTS = ("first", "second", "both")


@dataclass(frozen=True)
class ChainingConfig(EvaluateConfig):
    pairs: int | None = None
    """Pairs of tasks per suite, spread over the first tasks; by default all."""
    video: bool = field(default=False)
    """Write an MP4 per episode."""

    @property
    def default_roots(self) -> dict[str, Path]:
        return super().default_roots | {"save_root": Path("results") / f"{self.benchmark}_chaining"}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pairs is not None and self.pairs < 1:
            raise ValueError(f"--pairs is {self.pairs}; it must be at least 1")
        if self.policy == "replay":
            raise ValueError("--policy replay repeats single tasks; it knows no sequences")


def compatible(first: LiberoTask, second: LiberoTask) -> bool:
    """Whether both goals can hold at once: no thing, drawer or knob is asked to be two things."""
    asked = {predicate[1]: predicate for predicate in first.problem.goal}
    return all(asked.get(predicate[1], predicate) == predicate for predicate in second.problem.goal)


def find_pairs(tasks: Sequence[LiberoTask]) -> list[tuple[LiberoTask, LiberoTask]]:
    """Ordered pairs of tasks that can be done in the first one's scene: each first task with the next one that suits,
    then each with the one after that, and so on."""
    of_task = []
    for task in tasks:
        if task.fault is None:
            others = [other for other in others_in_scene(task, tasks) if compatible(task, other)]
            others.sort(key=lambda other: (other.task_id - task.task_id) % (len(tasks) + 1))
            of_task.append([(task, other) for other in others])
    return [pair for turn in zip_longest(*of_task) for pair in turn if pair is not None]


def trials(pairs: Sequence[tuple[LiberoTask, LiberoTask]], episodes: Iterable[Episode]) -> dict[str, list[Trial]]:
    """Each pair's coaching and chaining runs, from the first tasks' episodes; filed as task
    ``PAIR`` times the first one's number, plus the second's."""
    made: dict[str, list[Trial]] = {COACHING: [], CHAINING: []}
    of_task: dict[int, list[Episode]] = {}
    for episode in episodes:
        of_task.setdefault(episode.key.task_id, []).append(episode)
    for first, second in pairs:
        goals = (first.problem.goal, second.problem.goal)
        sentence = first.language + THEN + second.language
        both = tuple(dict.fromkeys(goals[0] + goals[1]))
        stages = {
            COACHING: (Stage(first.language, goals[:1]), Stage(second.language, goals[1:])),
            CHAINING: (Stage(sentence, (both,)),),
        }
        for episode in of_task.get(first.task_id, ()):
            row = (PAIR * first.task_id + second.task_id, episode.key.episode_id)
            for kind, steps in ((COACHING, episode.max_steps), (CHAINING, 2 * episode.max_steps)):
                about = (("second", second.name),)
                common = {"watched": (*goals, both), "wanted": (2,), "row": row, "about": about}
                made[kind].append(Trial(episode.key, first, sentence, steps, stages=stages[kind], **common))
    return made


def rates(runs: Sequence[dict[str, Any]]) -> dict[str, Cell]:
    """How often the first task's goal ever held, the second's, and both at the end."""
    outcomes = [(run["ever"][0], run["ever"][1], run["held"][2]) for run in runs]
    columns = zip(*outcomes, strict=True)
    return {part: Cell(sum(column) / len(column), len(column)) for part, column in zip(PARTS, columns, strict=True)}


def format_rates(of_suites: dict[str, dict[str, dict[str, Cell]]]) -> str:
    lines = [f"{'':32}" + "".join(f" {part:>20}" for part in PARTS) + f" {'n':>5}"]
    for suite, kinds in of_suites.items():
        for kind, cells in kinds.items():
            name = f"{suite} {kind}"
            cell_texts = "".join(f" {percent(cells[part]):>20}" for part in PARTS)
            lines.append(f"{name:32}{cell_texts} {cells[PARTS[0]].episodes:>5}")
    return "\n".join(lines)


def measure(config: ChainingConfig) -> dict[str, dict[str, dict[str, Cell]]]:
    """Run what is missing; suite -> kind -> rates. Raises what ``evaluate.prepare`` and ``run_trials`` raise, and
    ``SimulatorError`` where a suite has no pairs."""
    prepared = prepare(config)
    measured = {}
    for suite in prepared.work:
        tasks = doable(config, suite_tasks(suite.suite, config.benchmark))
        chosen = {episode.task for episode in suite.episodes}
        pairs = [pair for pair in find_pairs(tasks) if pair[0] in chosen][: config.pairs]
        if not pairs:
            raise SimulatorError(f"no two of {suite.suite}'s tasks can be done in one scene; leave it out of --suites")
        groups = trials(pairs, suite.episodes)
        runs = run_trials(config, prepared, suite, groups)
        measured[suite.suite] = {kind: rates(of_kind) for kind, of_kind in runs.items()}
    return measured


def main(argv: Sequence[str]) -> int:
    def act(config: ChainingConfig) -> None:
        print(format_rates(measure(config)))

    return run_command(argv, ChainingConfig, COMMAND, f"python -m {COMMAND}", __doc__, act)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
