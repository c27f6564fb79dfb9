"""Episodes with other instructions than the task's, or several: run, watched for several goals, and kept."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from examples.errors import SimulatorError
from examples.libero.bddl import Goal
from examples.libero.evaluate import EvaluateConfig, Prepared, outcome_settings
from examples.libero.policies import inability
from examples.libero.results import Row, SuiteResults, read_results
from examples.libero.rollout import EpisodeKey, EpisodeResult, Plan, Policy, begin_at, pursue
from examples.libero.tasks import LiberoTask
from examples.libero.workers import Episode, EpisodeRunner, Outcome, run_episodes
from examples.libero.worklist import SuiteWork, video_file

PATH_EVERY = 5  # control steps between the positions that results keep


@dataclass(frozen=True)
class Stage:
    """A stretch of an episode under one instruction, of at most the episode's ``max_steps``."""

    instruction: str
    goals: tuple[Goal, ...]
    """It ends when one of these holds."""


@dataclass(frozen=True)
class Trial(Episode):
    stages: tuple[Stage, ...] = ()
    watched: tuple[Goal, ...] = ()
    """Goals whose fate is reported."""
    wanted: tuple[int, ...] = ()
    """Numbers of those of ``watched`` that make the trial a success where all of them hold at its end."""
    row: tuple[int, int] = (0, 0)
    """Numbers by which the results file it, unique in the group."""
    about: tuple[tuple[str, Any], ...] = ()
    """What else the results say of it."""


@dataclass(frozen=True)
class TrialOutcome(Outcome):
    ever: tuple[bool, ...]
    """Whether each of ``watched`` held at some step."""
    held: tuple[bool, ...]
    """Whether it held at the end."""


class TrialRunner(EpisodeRunner):
    def outcome(self, trial: Trial, policy: Policy, env: Any, on_step: Callable[[Plan], None] | None) -> EpisodeResult:
        result, self._ever, self._held = run_trial(env, policy, trial, self._execute_steps, on_step)
        return result

    def run(self, trial: Trial) -> TrialOutcome:
        outcome = super().run(trial)
        return TrialOutcome(outcome.result, outcome.seconds, self._ever, self._held)


def run_trial(
    env: Any, policy: Policy, trial: Trial, execute_steps: int, on_step: Callable[[Plan], None] | None = None
) -> tuple[EpisodeResult, tuple[bool, ...], tuple[bool, ...]]:
    """The outcome, and which watched goals ever held, and which at the end.

    A stage begins when the one before reached its goal or ran out of steps or plans.
    """
    begin_at(env, policy.start(env.task, trial.key), trial.key.derived_seed("scene"))
    path, queries = [env.world_from_ee[:3, 3]], 0
    ever = np.zeros(len(trial.watched), bool)

    def reached(env: Any, goals: Sequence[Goal]) -> bool:
        ever[:] |= [env.holds(goal) for goal in trial.watched]
        return any(env.holds(goal) for goal in goals)

    for number, stage in enumerate(trial.stages):
        if number == 0:
            policy.begin(env, stage.instruction, trial.key)
        else:
            policy.instruct(env, stage.instruction)
        until = env.time + trial.max_steps

        def ended(env: Any, goals: Sequence[Goal] = stage.goals) -> bool:
            return reached(env, goals)

        queries += pursue(env, policy, until, execute_steps, ended, path, on_step)[1]
    held = tuple(env.holds(goal) for goal in trial.watched)
    success = all(held[number] for number in trial.wanted)
    return EpisodeResult(success, env.time, queries, np.array(path)), tuple(ever.tolist()), held


def run_trials(
    config: EvaluateConfig, prepared: Prepared, suite: SuiteWork, groups: dict[str, Iterable[Trial]], **settings: Any
) -> dict[str, list[dict[str, Any]]]:
    """Run what is missing of a suite's trials; group -> what is known of each trial, those of earlier runs included.

    Results are kept as the evaluator keeps them, in ``<save_root>/<suite>/<group>/<model>.csv`` and ``.json``.

    Args:
        groups: name -> trials.
        settings: what outcomes depend on besides the evaluator's settings.
    Raises:
        ResultsError: results that cannot be gone on with.
        RunStopped: a trial could not be run; what was finished is kept.
    """
    files: dict[str, Path] = {}
    with ExitStack() as stack:
        results: dict[str, SuiteResults] = {}
        todo: list[Trial] = []
        group_of: dict[EpisodeKey, str] = {}
        for group, trials in groups.items():
            folder = config.save_root / f"{suite.suite}_{config.suffix}".rstrip("_") / group
            all_settings = outcome_settings(config, suite, prepared) | {"group": group, **settings}
            about = {"model": config.name, "skipped_tasks": suite.skipped}
            opened = stack.enter_context(SuiteResults(folder, config.name, all_settings, about, config.conti))
            results[group], files[group] = opened, opened.csv_file
            for trial in trials:
                if trial.row in opened:
                    continue
                if config.video:
                    path = video_file(config.video_root / group, suite.suite, config.suffix, config.name, trial.key)
                    trial = replace(trial, video=path)
                group_of[_identity(trial)] = group
                todo.append(trial)

        def note(trial: Trial, outcome: TrialOutcome) -> None:
            told = {
                "task": trial.task.name,
                **dict(trial.about),
                "steps": outcome.result.steps,
                "ever": outcome.ever,
                "held": outcome.held,
                "path": outcome.result.ee_path[::PATH_EVERY].round(4).tolist(),
            }
            prompt = " / ".join(stage.instruction for stage in trial.stages)
            row = Row(*trial.row, outcome.result.success, prompt)
            results[group_of[_identity(trial)]].add(row, **told)

        runner = TrialRunner(
            config.policy_settings(),
            config.execute_steps,
            config.image_size,
            config.video_every or config.execute_steps,
        )
        run_episodes(runner, todo, config.num_workers, note)
        for opened in results.values():
            opened.write()
    return {group: read_results(file)[1]["episodes"] for group, file in files.items()}


def others_in_scene(task: LiberoTask, tasks: Iterable[LiberoTask]) -> list[LiberoTask]:
    """Those of ``tasks`` that can be asked for in the scene of ``task``: everything their goal is about is there, it is
    another goal, and it does not hold from the start."""
    problem = task.problem
    return [
        other
        for other in tasks
        if other.fault is None
        and other.language != task.language
        and set(other.problem.goal) != set(problem.goal)
        and problem.names(other.problem.goal)
        and not set(other.problem.goal) <= set(problem.init)
    ]


def doable(config: EvaluateConfig, tasks: Iterable[LiberoTask]) -> list[LiberoTask]:
    """The tasks that the policy may be asked for: all, except of the expert.

    Raises ``SimulatorError`` where there are none.
    """
    policy = config.policy_settings()
    asked = [task for task in tasks if task.fault is None and inability(policy, task) is None]
    if not asked:
        raise SimulatorError(f"the {config.policy} can do none of these tasks; choose other --suites")
    return asked


def _identity(trial: Trial) -> tuple:
    return trial.key, trial.stages
