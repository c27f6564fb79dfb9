"""Run a conversion: worker processes that may die, episodes that may be wrong, and a record of what became of each."""

from __future__ import annotations

import fcntl
import json
import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Protocol

from tqdm import tqdm

from data_utils.convert.videos import decord_refuses, with_own_videos
from data_utils.errors import DataError
from data_utils.h5io import EpisodeData, write_episode

RECORD = "conversion.json"
LOCK = ".conversion.lock"
SUFFIX = ".h5"
WORKER_DIED = "worker died"
UNEXPECTED = "unexpected error"
SHOWN_DIFFERENCES = 5


@dataclass(frozen=True)
class Job:
    """One episode to convert.

    Args:
        name: of the episode file, relative to the output folder and without its suffix ("chunk-000/episode_000012").
        key: what the converter needs to find the episode again; picklable.
    """

    name: str
    key: tuple


class Skipped(Exception):
    """Raised by a converter for an episode that is left out on purpose; the reason in one line."""


class Converter(Protocol):
    """A format's reader. It is pickled once for every worker process, so what it opens it opens on first use."""

    def jobs(self) -> list[Job]:
        """The episodes of the source, cheaply. Raises DataError where there is no such source."""

    def convert(self, job: Job) -> EpisodeData:
        """One episode. Raises :class:`Skipped` or DataError."""


@dataclass(frozen=True)
class Failure:
    """An episode that could not be converted: the rule of ``data_utils.errors.RULES``, or what else went wrong."""

    episode: str
    rule: str
    message: str


@dataclass(frozen=True)
class _Converted:
    """An episode that was written; ``refused`` is what ``videos.decord_refuses`` says of its videos."""

    refused: frozenset[str]


@dataclass(frozen=True)
class _Task:
    """What every worker is told once."""

    converter: Converter
    out: Path
    copy_videos: bool


@dataclass
class Summary:
    """What became of the episodes of a source."""

    episodes: int
    already_there: int = 0
    converted: int = 0
    skipped: dict[str, str] = field(default_factory=dict)  # episode -> reason
    failed: list[Failure] = field(default_factory=list)
    refused: set[str] = field(default_factory=set)  # why decord cannot read videos of these episodes
    interrupted: bool = False

    def text(self) -> str:
        """A few lines for people."""
        head = f"{self.converted} converted, {self.already_there} already there, {len(self.skipped)} skipped"
        lines = [f"{head}, {len(self.failed)} failed, of {self.episodes} episodes"]
        lines += [f"  skipped {n}: {reason}" for reason, n in Counter(self.skipped.values()).most_common()]
        for rule, n in Counter(item.rule for item in self.failed).most_common():
            first = next(item for item in self.failed if item.rule == rule)
            lines.append(f"  failed {n}: {rule}; the first, {first.episode}: {first.message}")
        lines += [f"  videos {why}: train with --video_reader pyav" for why in sorted(self.refused)]
        if self.interrupted:
            lines.append("  interrupted; the same command goes on from here")
        return "\n".join(lines)


def run(
    converter: Converter, out: Path, workers: int, settings: Mapping[str, object], copy_videos: bool = False
) -> Summary:
    """Convert every episode of a source that ``out`` does not hold yet.

    An episode is there whole or not at all, whatever kills the process. ``out/conversion.json`` records the settings
    and the outcome; ``Ctrl-C`` stops the workers and returns with ``interrupted`` set.

    Args:
        converter: reads the source.
        out: folder of the episode files; made where it is missing.
        workers: processes that convert.
        settings: what the episodes depend on (JSON-able); must be those that ``out`` was begun with, once it holds
            an episode.
        copy_videos: link or copy the videos that episodes refer to into ``out/videos``.
    Raises:
        DataError: no such source, ``out`` belongs to other settings or to a conversion that is running.
    """
    if workers < 1:
        raise DataError(f"workers is {workers}; wanted at least 1", "location")
    jobs = converter.jobs()
    names = Counter(job.name for job in jobs)
    if len(names) < len(jobs):
        raise AssertionError(f"two episodes are called {names.most_common(1)[0][0]}")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{out}: cannot be made ({error.strerror}); name another folder", "location") from error
    with (out / LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise DataError(f"{out}: another conversion is writing there; wait for it", "location") from error
        settings = json.loads(json.dumps(dict(settings)))
        refused = _check_settings(out, settings)
        _remove_temporaries(out)
        summary = Summary(len(jobs), refused=refused)
        todo = [job for job in jobs if not (out / f"{job.name}{SUFFIX}").is_file()]
        summary.already_there = len(jobs) - len(todo)
        write_record(out, settings, summary, "running")
        try:
            _convert_all(_Task(converter, out, copy_videos), todo, min(workers, len(todo)), summary)
        except KeyboardInterrupt:
            summary.interrupted = True
        _remove_temporaries(out)  # of workers that were killed
        write_record(out, settings, summary, "interrupted" if summary.interrupted else "finished")
    return summary


# -- the output folder --------------------------------------------------------------------------------------------


def write_record(out: Path, settings: Mapping[str, object], summary: Summary, state: str) -> None:
    """Write ``conversion.json``: settings, counts, and every episode that was left out, with the reason."""
    content = {
        "state": state,
        "settings": settings,
        "episodes": summary.episodes,
        "converted": summary.converted,
        "already_there": summary.already_there,
        "skipped": [{"episode": name, "reason": reason} for name, reason in sorted(summary.skipped.items())],
        "failed": [asdict(failure) for failure in sorted(summary.failed, key=lambda failure: failure.episode)],
        "videos_refused_by_decord": sorted(summary.refused),
    }
    temporary = out / f".{RECORD}.tmp"
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(content, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, out / RECORD)


def _check_settings(out: Path, settings: dict) -> set[str]:
    """Raises DataError where ``out`` holds episodes of other settings; returns what decord refuses of its videos."""
    record = out / RECORD
    if not record.is_file():
        return set()
    try:
        content = json.loads(record.read_text(encoding="utf-8"))
        begun, refused = dict(content["settings"]), set(content.get("videos_refused_by_decord", ()))
        recorded = content["converted"] + content["already_there"]
    except (ValueError, KeyError, TypeError) as error:
        what = f"is not the record of a conversion ({error}); remove it, or name another --out"
        raise DataError(f"{record}: {what}", "location") from error
    differing = list(_differences(begun, settings, ""))
    if not differing:
        return refused
    # A conversion that was killed has not recorded its episodes: the files count too.
    if not recorded and not any(out.rglob(f"*{SUFFIX}")):
        return set()
    more = f"; and {len(differing) - SHOWN_DIFFERENCES} more" if len(differing) > SHOWN_DIFFERENCES else ""
    listed = "; ".join(differing[:SHOWN_DIFFERENCES]) + more
    what = f"holds episodes of other settings ({listed}); name another --out, or remove that folder"
    raise DataError(f"{out}: {what}", "location")


def _differences(old: object, new: object, where: str) -> Iterator[str]:
    """``path: old -> new`` for every innermost value that differs between two JSON values."""
    if isinstance(old, dict) and isinstance(new, dict):
        for name in sorted({*old, *new}):
            yield from _differences(old.get(name), new.get(name), f"{where}.{name}".lstrip("."))
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for index, (one, other) in enumerate(zip(old, new, strict=True)):
            yield from _differences(one, other, f"{where}[{index}]")
    elif old != new:
        texts = [value if isinstance(value, str) else json.dumps(value) for value in (old, new)]
        begin = max(0, len(os.path.commonprefix(texts)) - 20)  # long values are cut around their first difference
        yield f"{where}: {' -> '.join(_shown(text, begin) for text in texts)}"


def _shown(text: str, begin: int) -> str:
    if len(text) <= 100:
        return text
    return f"{'...' if begin else ''}{text[begin : begin + 100]}{'...' if len(text) > begin + 100 else ''}"


def _remove_temporaries(out: Path) -> None:
    """What a killed conversion left; only called under the folder's lock."""
    for temporary in out.rglob(".*.tmp"):
        temporary.unlink(missing_ok=True)


# -- the parent's side --------------------------------------------------------------------------------------------


def _convert_all(task: _Task, jobs: list[Job], count: int, summary: Summary) -> None:
    pending = deque(jobs)
    pool: list[_Worker] = []
    # On a terminal a moving bar, in a log file a line now and then.
    interval = 0.1 if sys.stderr.isatty() else 30.0
    bar = tqdm(total=summary.episodes, initial=summary.already_there, unit="episode", mininterval=interval)
    try:
        pool += [_Worker(task) for _ in range(count)]
        while pool:
            for connection in wait([worker.connection for worker in pool]):
                worker = next(item for item in pool if item.connection is connection)
                finished = worker.job
                outcome = worker.outcome()
                if finished is not None:
                    _account(finished, outcome, summary, bar)
                if worker.is_dead:
                    pool.remove(worker)
                    if pending:
                        worker = _Worker(task)
                        pool.append(worker)
                elif pending:
                    worker.give(pending.popleft())
                else:
                    worker.give(None)
                    pool.remove(worker)
    finally:
        bar.close()
        for worker in pool:
            worker.process.kill()
            worker.process.join()


def _account(job: Job, outcome: _Converted | Skipped | Failure, summary: Summary, bar: tqdm) -> None:
    if isinstance(outcome, _Converted):
        summary.converted += 1
        summary.refused |= outcome.refused
    elif isinstance(outcome, Skipped):
        summary.skipped[job.name] = str(outcome)
    else:
        summary.failed.append(outcome)
        bar.write(f"{job.name}: {outcome.message}", file=sys.stderr)
    bar.update()
    bar.set_postfix(converted=summary.converted, skipped=len(summary.skipped), failed=len(summary.failed))


class _Worker:
    """A worker process as its parent sees it: ready without a job at first, then with one job at a time."""

    def __init__(self, task: _Task) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(task, theirs), daemon=True)
        # Inherited by the process: the parent alone decides what a Ctrl-C means.
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            self.process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        theirs.close()  # so that the pipe ends with the process
        self.job: Job | None = None
        self.is_dead = False

    def give(self, job: Job | None) -> None:
        """The next job; None ends the process."""
        self.job = job
        try:
            self.connection.send(job)
        except OSError:
            pass  # it died meanwhile: the pipe's end says so

    def outcome(self) -> _Converted | Skipped | Failure | None:
        """Of the job given last, None before the first; a dead process is a :class:`Failure` of its job."""
        try:
            outcome = self.connection.recv()
        except (EOFError, OSError):
            self.is_dead = True
            self.process.join()
            how = _ending(self.process.exitcode)
            if self.job is None:
                raise RuntimeError(f"a worker process {how} before its first episode; see its message above") from None
            return Failure(self.job.name, WORKER_DIED, f"the worker process {how} while converting it")
        return outcome


def _ending(code: int | None) -> str:
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        return f"was killed by {name}{' (out of memory?)' if name == 'SIGKILL' else ''}"
    return f"ended with exit code {code}"


# -- the worker's side --------------------------------------------------------------------------------------------


def _work(task: _Task, connection: Connection) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    connection.send(None)  # ready
    while (job := connection.recv()) is not None:
        connection.send(_convert_one(task, job))


def _end_with_parent() -> None:
    """A worker whose parent was killed must not go on writing beside the next conversion."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _convert_one(task: _Task, job: Job) -> _Converted | Skipped | Failure:
    path = task.out / f"{job.name}{SUFFIX}"
    try:
        data = task.converter.convert(job)
        converted = _Converted(decord_refuses(data))
        path.parent.mkdir(parents=True, exist_ok=True)
        if task.copy_videos:
            data = with_own_videos(data, path, task.out)
        write_episode(path, data)
    except Skipped as reason:
        return reason
    except DataError as error:
        return Failure(job.name, error.rule, str(error))
    except Exception as error:  # a fault of a library on this one file must not end the run
        place = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(place.filename).name}:{place.lineno}"
        return Failure(job.name, UNEXPECTED, f"{type(error).__name__} at {where}: {' '.join(str(error).split())}")
    return converted
