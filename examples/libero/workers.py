"""Simulator processes that run episodes and may die over them; the process that hands out work merges results alone."""

from __future__ import annotations

import contextlib
import sys
import time
import traceback
from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from data_utils.cli import bar
from data_utils.words import one_line
from data_utils.worker_process import WorkerDied, WorkerProcess
from examples.errors import SceneError, SimulatorError
from examples.libero import environment
from examples.libero.policies import make_policy
from examples.libero.policy_settings import PolicyError, PolicySettings
from examples.libero.rollout import EpisodeKey, EpisodeResult, Plan, Policy, run_episode
from examples.libero.tasks import LiberoTask
from shm_transport import RemoteError, SessionLost, TransportError

ATTEMPTS = 3  # at an episode over which a process died, or lost the service


class RunStopped(RuntimeError):
    """The run cannot go on; the message says why. What was finished is kept.

    Args:
        again: whether the same command may do better.
    """

    def __init__(self, message: str, again: bool = True) -> None:
        super().__init__(message)
        self.remedy = "the same command goes on from there" + ("" if again else " once that is mended")


@dataclass(frozen=True)
class Episode:
    """One piece of work."""

    key: EpisodeKey
    task: LiberoTask
    instruction: str
    max_steps: int
    video: Path | None = None


@dataclass(frozen=True)
class Outcome:
    """What became of an episode."""

    result: EpisodeResult
    seconds: float
    """Wall time."""


@dataclass(frozen=True)
class _Failure:
    message: str
    again: bool = False  # worth another attempt
    scene: bool = False  # of the task, whose scene does not load


class EpisodeRunner:
    """Runs episodes in a process of its own: keeps its policy, and the scene for as long as the task stays the same.

    Args:
        policy: who decides.
        execute_steps: control steps between two queries.
        image_size: height and width of images, where any are rendered.
        video_every: control steps between two frames of a video.
    """

    def __init__(self, policy: PolicySettings, execute_steps: int, image_size: int, video_every: int) -> None:
        self._settings, self._execute_steps = policy, execute_steps
        self._image_size, self._video_every = image_size, video_every
        self._policy = self._env = None
        self._scene: tuple[LiberoTask, int | None] | None = None

    def __call__(self, episode: Episode) -> Outcome | _Failure:
        try:
            return self.run(episode)
        except SessionLost as error:
            return _Failure(str(error), again=True)
        except SceneError as error:
            return _Failure(str(error), scene=True)
        except (SimulatorError, PolicyError, TransportError, RemoteError, ImportError) as error:
            return _Failure(one_line(error, None))
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{Path(place.filename).name}:{place.lineno}"
            return _Failure(f"{type(error).__name__} at {where}: {one_line(error, None)}")

    def run(self, episode: Episode) -> Outcome:
        """Raises what the simulator, the policy and its service raise."""
        started = time.monotonic()
        if self._policy is None:
            self._policy = make_policy(self._settings)
        env = self._environment(episode)
        with self._film(episode, env) as video:
            result = self.outcome(episode, self._policy, env, None if video is None else video.add)
            if video is not None:
                video.end(result.success)
        return Outcome(result, time.monotonic() - started)

    def outcome(
        self, episode: Episode, policy: Policy, env: Any, on_step: Callable[[Plan], None] | None
    ) -> EpisodeResult:
        """What comes of an episode; for those who do more in one than follow its instruction."""
        return run_episode(
            env, policy, episode.key, episode.instruction, episode.max_steps, self._execute_steps, on_step
        )

    def close(self) -> None:
        for part in (self._env, self._policy):
            if part is not None:
                part.close()
        self._env = self._policy = self._scene = None

    def _film(self, episode: Episode, env: Any) -> contextlib.AbstractContextManager:
        if episode.video is None:
            return contextlib.nullcontext()
        from examples.libero.video import EpisodeVideo  # fonts and a video library, for those who film

        return EpisodeVideo(episode.video, env, episode.instruction, self._video_every)

    def _environment(self, episode: Episode) -> Any:
        size = self._image_size if self._policy.needs_images or episode.video is not None else None
        if self._scene != (episode.task, size):
            if self._env is not None:
                self._env.close()
                self._env = self._scene = None
            simulator = environment.import_simulator(episode.task.benchmark)
            self._env = simulator.LiberoEnv(episode.task, size)
            self._scene = episode.task, size
        return self._env


def run_episodes(
    runner: EpisodeRunner,
    episodes: Iterable[Episode],
    num_workers: int,
    on_outcome: Callable[[Episode, Outcome], None],
    done: Counter[bool] | None = None,
    leave_out: Callable[[LiberoTask, str], None] | None = None,
) -> None:
    """Run episodes in ``num_workers`` processes; their order, and which process runs which, does not matter.

    ``on_outcome`` is called in this process, once for every episode as it ends. An episode over which a process died
    is given to another.

    Args:
        done: outcomes of episodes that ended before, for the progress line.
        leave_out: called with a task whose scene does not load, and why, once for each of its episodes that was given
            out; the others are dropped. None: such a task ends the run.
    Raises:
        RunStopped: an episode cannot be run; no more are begun.
    """
    queue = _TaskQueue(episodes)
    pool: list[WorkerProcess] = []
    attempts: Counter[EpisodeKey] = Counter()
    lost_at_start = 0
    tally = Counter(done or ())
    progress = bar(total=len(queue) + tally.total(), initial=tally.total(), unit="episode")
    try:
        pool += [WorkerProcess(runner) for _ in range(min(num_workers, len(queue)))]
        while pool:
            for connection in wait([worker.connection for worker in pool]):
                worker = next(item for item in pool if item.connection is connection)
                episode: Episode | None = worker.job
                try:
                    outcome = worker.outcome()
                except WorkerDied as death:
                    outcome = None if episode is None else _Failure(f"the simulator's process {death}", again=True)
                    lost_at_start += episode is None
                    if lost_at_start == ATTEMPTS:
                        raise RunStopped(f"a simulator's process {death} when it started") from None
                    pool[pool.index(worker)] = WorkerProcess(runner)  # asks for work when it is ready
                    worker = None
                if isinstance(outcome, _Failure) and outcome.scene and leave_out is not None:
                    leave_out(episode.task, outcome.message)
                    progress.total -= 1 + queue.drop(episode.task)
                    progress.refresh()
                elif isinstance(outcome, _Failure):
                    attempts[episode.key] += 1
                    name = f"{episode.task.suite} task {episode.key.task_id} episode {episode.key.episode_id}"
                    if not outcome.again or attempts[episode.key] == ATTEMPTS:
                        raise RunStopped(f"{name}: {outcome.message}", outcome.again)
                    progress.write(f"{name}: {outcome.message}; it is run again", file=sys.stderr)
                    queue.put_back(episode)
                elif outcome is not None:
                    tally[outcome.result.success] += 1
                    on_outcome(episode, outcome)
                    progress.update()
                    progress.set_postfix_str(f"{100 * tally[True] / tally.total():.1f}% success")
                if worker is not None:
                    others = [item.job for item in pool if item is not worker]
                    worker.give(queue.take(None if episode is None else episode.task, others))
                    if worker.job is None:
                        pool.remove(worker)
    finally:
        progress.close()
        for worker in pool:
            worker.kill()


def check_scenes(tasks: Iterable[LiberoTask]) -> dict[LiberoTask, str]:
    """Build the scenes of some tasks, so that missing meshes are not found hours later: which do not load, and why.

    Raises ``SimulatorError`` where the simulator does not work at all.
    """
    faults = {}
    worker = WorkerProcess(_scene_fault)  # a process of its own: building scenes leaves memory behind
    try:
        worker.outcome()  # ready
        for task in tasks:
            worker.give(task)
            if (fault := worker.outcome()) is None:
                continue
            if not fault.scene:
                raise SimulatorError(fault.message)
            faults[task] = fault.message
    except WorkerDied as death:
        raise SimulatorError(f"{worker.job.suite}: the simulator's process {death}") from None
    finally:
        worker.kill()
    return faults


def _scene_fault(task: LiberoTask) -> _Failure | None:
    try:
        environment.import_simulator(task.benchmark).LiberoEnv(task, image_size=None).close()
    except (SimulatorError, ImportError) as error:
        return _Failure(str(error), scene=isinstance(error, SceneError))
    return None


class _TaskQueue:
    """Episodes that wait, by task, in order: building a scene takes seconds, so a process stays with one."""

    def __init__(self, episodes: Iterable[Episode]) -> None:
        self._waiting: dict[LiberoTask, deque[Episode]] = {}
        for episode in episodes:
            self._waiting.setdefault(episode.task, deque()).append(episode)

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values()))

    def put_back(self, episode: Episode) -> None:
        self._waiting.setdefault(episode.task, deque()).appendleft(episode)

    def drop(self, task: LiberoTask) -> int:
        """Forget a task's episodes; how many they were."""
        return len(self._waiting.pop(task, ()))

    def take(self, task: LiberoTask | None, in_flight: Iterable[Episode | None]) -> Episode | None:
        """Of ``task`` where one waits, else of the task that fewest processes are at; None: nothing waits."""
        if not self._waiting:
            return None
        if task not in self._waiting:
            crowds = Counter(episode.task for episode in in_flight if episode is not None)
            task = min(self._waiting, key=crowds.__getitem__)  # the first of several
        episode = self._waiting[task].popleft()
        if not self._waiting[task]:
            del self._waiting[task]
        return episode
