"""Records the scripted expert's demonstrations as episode files.

    python -m examples.libero.record --suite libero_object --episodes 50 --out data/libero_expert --workers 2

An episode depends on its task, its number and ``--seed`` alone. Scenes are drawn anew: the benchmark's stored initial
states are the evaluation's, and none is recorded. Failed episodes are left out and counted; the same command goes on
where it was stopped.
"""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from data_utils.cli import CommandLineError, parse
from data_utils.convert.runner import Job, Skipped, run
from data_utils.errors import DataError
from data_utils.h5io import EpisodeData
from examples.disturbance import Disturbance
from examples.errors import SimulatorError
from examples.libero import environment
from examples.libero.benchmarks import find_benchmark
from examples.libero.control import libero_action
from examples.libero.convert import Recording
from examples.libero.expert import ScriptedExpert, check_goal
from examples.libero.rollout import EpisodeKey, Plan, Policy, Start, run_episode
from examples.libero.tasks import LiberoTask, suite_tasks

if TYPE_CHECKING:
    from examples.libero.simulator import LiberoEnv

COMMAND = "examples.libero.record"
MAX_STEPS = 600
PUSHES_PER_STEP = 0.06  # of free motion, while there is --noise
DRAWN_SCENES = "drawn scenes of "  # before a suite's name in the seeds: evaluation draws other numbers


@dataclass(frozen=True)
class RecordConfig:
    suite: str
    """One of the benchmark's suites."""
    out: Path
    """Folder of the episode files: <out>/<suite>/<task>/demo_0000.h5."""
    benchmark: str = "libero"
    tasks: str = "all"
    """Numbers of tasks, separated by commas ("0,3,7"), or all that the expert can do."""
    episodes: int = 50
    """Per task; those that fail are left out."""
    seed: int = 0
    noise: float = 0.02
    """Size (m) of pushes that the executed motion suffers now and then, and the recorded desired poses do not, so that
    episodes hold ways back to the path; 0: none."""
    image_size: int = 256
    """Height and width of the images, in pixels."""
    workers: int = 1
    """Processes; one simulator each."""

    def __post_init__(self) -> None:
        find_benchmark(self.benchmark)
        for name, least in (("episodes", 1), ("workers", 1), ("image_size", 16), ("seed", 0), ("noise", 0.0)):
            if getattr(self, name) < least:
                raise CommandLineError(f"--{name} is {getattr(self, name)}; it must be at least {least}")


class Demonstrator(Policy):
    """The expert, disturbed and written down."""

    needs_images = True

    def __init__(self, disturbance: Disturbance | None) -> None:
        self._expert, self._disturbance = ScriptedExpert(), disturbance

    def start(self, task: LiberoTask, episode: EpisodeKey) -> Start:
        return Start()

    def begin(self, env: LiberoEnv, instruction: str, episode: EpisodeKey) -> None:
        # Setting the state sets the controller's goal too, as it will be when the episode is repeated.
        self.initial_state = env.state
        env.set_state(self.initial_state)
        self.recording = Recording(env)
        self._expert.begin(env, instruction, episode)

    def plan(self, env: LiberoEnv) -> Plan | None:
        perturbable = self._expert.perturbable
        plan = self._expert.plan(env)
        if plan is None:
            return None
        self.recording.add(libero_action(plan.poses[0], plan.openness[0], env.world_from_ee))
        if self._disturbance is None or not perturbable:
            return plan
        return Plan(self._disturbance(plan.poses[0])[None], plan.openness)


class LiberoRecorder:
    """Makes episodes where a converter reads them, so that workers, stops and the record of it all are the same."""

    def __init__(self, config: RecordConfig, tasks: list[LiberoTask]) -> None:
        self.config, self.tasks = config, tasks
        self._env: LiberoEnv | None = None  # of the last episode's task; building one takes seconds

    def jobs(self) -> list[Job]:
        return [
            Job(f"{task.suite}/{task.name}/demo_{number:04d}", (task, number))
            for task in self.tasks
            for number in range(self.config.episodes)
        ]

    def made_from(self, job: Job) -> None:
        """Of nothing that could change beside the settings."""

    def convert(self, job: Job) -> EpisodeData:
        """Raises ``Skipped`` where the expert fails."""
        task, number = job.key
        config = self.config
        key = EpisodeKey(f"{DRAWN_SCENES}{task.suite}", task.task_id, number, config.seed)
        rng = np.random.default_rng(key.derived_seed("pushes"))
        policy = Demonstrator(Disturbance(rng, PUSHES_PER_STEP, config.noise) if config.noise else None)
        result = run_episode(self._environment(task), policy, key, task.language, MAX_STEPS, execute_steps=1)
        if not result.success:
            raise Skipped("the expert failed")
        source = f"{COMMAND}: {task.suite} task {task.task_id}, episode {number}, seed {config.seed}"
        prompts = list(dict.fromkeys([task.language, task.problem.language]))
        return policy.recording.episode(prompts, policy.recording.origin(source, policy.initial_state))

    def _environment(self, task: LiberoTask) -> LiberoEnv:
        if self._env is None or self._env.task != task:
            if self._env is not None:
                self._env.close()
            simulator = environment.import_simulator(task.benchmark)
            self._env = simulator.LiberoEnv(task, self.config.image_size)
        return self._env


def chosen_tasks(benchmark: str, suite: str, chosen: str) -> list[LiberoTask]:
    """The tasks that ``--tasks`` names; "all" leaves out, and prints, those that the expert cannot do.

    Raises ``SimulatorError`` for a number that is no task's, or a task of which the expert says that it cannot do it.
    """
    tasks = suite_tasks(suite, benchmark)
    if chosen != "all":
        try:
            by_number = {task.task_id: task for task in tasks}
            picked = [by_number[int(number)] for number in chosen.split(",")]
        except (ValueError, KeyError):
            last = len(tasks) - 1
            raise SimulatorError(f"--tasks {chosen!r}: wanted all, or numbers from 0 to {last} with commas") from None
        for task in picked:
            if task.fault is not None:
                raise SimulatorError(task.fault)
            check_goal(task, task.problem.goal)
        return picked
    picked = []
    for task in tasks:
        try:
            check_goal(task, task.problem.goal)
        except SimulatorError as reason:
            print(f"left out: {reason}", file=sys.stderr)
        else:
            picked.append(task)
    if not picked:
        raise SimulatorError(f"the expert can do no task of {suite}")
    return picked


def record(config: RecordConfig) -> int:
    """Records what is missing; returns the exit code."""
    environment.check_assets(config.benchmark)
    tasks = chosen_tasks(config.benchmark, config.suite, config.tasks)
    # More episodes or other tasks may join a folder; what they depend on must be the same.
    settings = {key: asdict(config)[key] for key in ("benchmark", "seed", "noise", "image_size")}
    settings |= {"format": "libero expert", "versions": environment.versions(config.benchmark)}
    summary = run(LiberoRecorder(config, tasks), config.out, config.workers, settings, done="recorded")
    tried = summary.converted + len(summary.skipped)
    print(f"{summary.converted} of {tried} episodes recorded, {summary.already_there} were there already: {config.out}")
    for failure in summary.failed:
        print(f"{failure.episode}: {failure.message}", file=sys.stderr)
    if summary.interrupted:
        missing = summary.episodes - summary.already_there - tried - len(summary.failed)
        print(f"interrupted; the same command goes on with the {missing} that are missing", file=sys.stderr)
    return 130 if summary.interrupted else 1 if summary.failed else 0


def main(argv: list[str]) -> int:
    """Exit code: 0, 1 where an episode could not be run, 2 where recording did not begin, 130 after Ctrl-C."""
    try:
        config = parse(RecordConfig, argv, f"python -m {COMMAND}", __doc__)
        environment.enter_libero(COMMAND)
        return record(replace(config, out=config.out.resolve()))
    except (CommandLineError, DataError, SimulatorError, ImportError) as error:
        print(f"python -m {COMMAND}: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
