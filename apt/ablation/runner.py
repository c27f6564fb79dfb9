"""Runs steps as processes, several side by side, says what is done and how long the rest takes, and stops in order."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from apt.ablation.results import REPOSITORY
from apt.ablation.study import Step
from data_utils.files import read_json, write_json
from data_utils.words import format_duration
from train_utils.failures import told_when_parent_dies

_POLL_S = 0.1
_LAST_WORDS = 300  # characters of a failed step's last line


@dataclass
class Pace:
    """Seconds per unit of each kind of work, as steps that ran here took, kept in a file.

    Args:
        path: of that file.
        guesses: seconds per unit where nothing has run yet; a kind that is in neither is unknown.
    """

    path: Path
    guesses: dict[str, float] = field(default_factory=dict)

    def add(self, kind: str, amount: float, seconds: float) -> None:
        measured = self._measured()
        units, total = measured.get(kind, (0.0, 0.0))
        write_json(self.path, {**measured, kind: (units + amount, total + seconds)})

    def seconds(self, steps: Sequence[Step], jobs: int) -> float | None:
        """That what is left of ``steps`` takes on ``jobs`` jobs; None where a kind of work is unknown."""
        measured, total = self._measured(), 0.0
        for step in steps:
            left = step.left()
            if left <= 0:
                continue
            units, seconds = measured.get(step.kind, (0.0, 0.0))
            rate = seconds / units if units else self.guesses.get(step.kind)
            if rate is None:
                return None
            total += rate * left
        return total / max(1, min(jobs, len(steps)))

    def _measured(self) -> dict[str, tuple[float, float]]:
        return read_json(self.path) if self.path.is_file() else {}


@dataclass
class _Job:
    step: Step
    process: subprocess.Popen
    slot: int
    began: float
    left: float


class Runner:
    """
    Args:
        slots: the GPUs of each job that may run beside others, as :attr:`Step.command` takes them.
        environment: of the processes, over this one's.
        say: takes a line for a person.
        failed: is told of each step that failed, and its last words.
    """

    def __init__(
        self,
        slots: Sequence[str],
        environment: dict[str, str],
        pace: Pace,
        say: Callable[[str], None],
        failed: Callable[[Step, str], None],
    ) -> None:
        self.slots, self.pace = list(slots), pace
        self._say, self._failed = say, failed
        self._environment = {**os.environ, **environment}
        self._jobs: list[_Job] = []
        self.signal: int | None = None
        """That told this process to stop; None: none did."""
        self.failures: list[Step] = []
        self._finished: set[Step] = set()

    @contextlib.contextmanager
    def catching(self) -> Iterator[None]:
        """Context in which Ctrl-C and SIGTERM reach the running steps, which save; a second Ctrl-C ends them."""

        def stop(number: int, _frame) -> None:
            again = self.signal is not None and number == signal.SIGINT
            for job in self._jobs:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(job.process.pid, signal.SIGKILL) if again else job.process.terminate()
            self.signal = number if self.signal is None else self.signal

        numbers = [n for n in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP) if signal.getsignal(n) != signal.SIG_IGN]
        previous = {number: signal.signal(number, stop) for number in numbers}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def run(self, steps: Sequence[Step]) -> None:
        """Runs what is not finished; returns when all is, has failed, or was told to stop."""
        waiting = [step for step in steps if not step.finished()]
        self._finished = set(steps) - set(waiting)
        while self._jobs or (waiting and self.signal is None):
            if self.signal is None:
                waiting = self._start_ready(waiting)
            for job in [job for job in self._jobs if job.process.poll() is not None]:
                self._jobs.remove(job)
                if self._ended(job):
                    self._finished.add(job.step)
                    open_steps = [*waiting, *(other.step for other in self._jobs)]
                    self._report(job, f"{len(self._finished)}/{len(steps)}", open_steps)
            time.sleep(_POLL_S)

    def _start_ready(self, waiting: list[Step]) -> list[Step]:
        """Starts what can start now; returns what still waits."""
        rest = []
        for step in waiting:
            free = [slot for slot in range(len(self.slots)) if slot not in {job.slot for job in self._jobs}]
            if step.after in self.failures:
                self.failures.append(step)
            elif free and (step.after is None or step.after in self._finished):
                self._start(step, free[0])
            else:
                rest.append(step)
        return rest

    def _start(self, step: Step, slot: int) -> None:
        gpus = self.slots[slot]
        environment = dict(self._environment)
        if not step.picks_gpus and not gpus.startswith("cpu"):
            environment["CUDA_VISIBLE_DEVICES"] = gpus
        self._say(f"{step.title} begins")
        step.log.parent.mkdir(parents=True, exist_ok=True)
        command = step.command(gpus)
        left = step.left()
        with open(step.log, "a", encoding="utf-8") as log:
            log.write(f"== {step.title}: {' '.join(command)}\n")
            log.flush()
            process = subprocess.Popen(
                command,
                cwd=REPOSITORY,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a terminal's Ctrl-C comes here alone
                preexec_fn=told_when_parent_dies,
            )
        self._jobs.append(_Job(step, process, slot, time.monotonic(), left))
        if self.signal is not None:  # it came while the process was being made
            process.terminate()

    def _ended(self, job: _Job) -> bool:
        """Whether the job's step is finished; one that is not, untold, has failed."""
        step = job.step
        if job.process.returncode == 0 and step.finished():
            return True
        if self.signal is None:
            self.failures.append(step)
            words = last_line(step.log)
            self._say(f"FAILED: {step.title} (exit code {job.process.returncode}): {words}; all it said: {step.log}")
            self._failed(step, words)
        return False

    def _report(self, job: _Job, done: str, open_steps: list[Step]) -> None:
        seconds = time.monotonic() - job.began
        self.pace.add(job.step.kind, job.left, seconds)
        left = self.pace.seconds(open_steps, len(self.slots))
        rest = "" if left is None else f", about {format_duration(left)} left"
        self._say(f"{done} {job.step.title}: {format_duration(seconds)}{rest}")


def last_line(log: Path) -> str:
    """The last line of a log that says something."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1][-_LAST_WORDS:] if lines else "it said nothing"
