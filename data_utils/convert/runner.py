"""Run a conversion: worker processes that may die, episodes that may be wrong, and a record of what became of each."""

from __future__ import annotations

import contextlib
import fcntl
import json
import sys
import traceback
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import wait
from pathlib import Path
from typing import Protocol

from tqdm import tqdm

from data_utils.cli import bar
from data_utils.convert.provenance import Provenance
from data_utils.convert.videos import decord_refuses, with_own_videos
from data_utils.errors import DataError
from data_utils.files import remove_leftovers, write_json
from data_utils.h5io import EpisodeData, write_episode
from data_utils.shards import Shard
from data_utils.words import describe_differences, one_line
from data_utils.worker_process import WorkerDied, WorkerProcess

RECORD, LOCK = "conversion{}.json", ".conversion{}.lock"  # {}: a part's suffix
SUFFIX = ".h5"
WORKER_DIED = "worker died"
UNEXPECTED = "unexpected error"


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

    def made_from(self, job: Job) -> object:
        """What the episode depends on beside the settings: files with size and time, and what else says that the
        source is another one. JSON-able, cheap, and the same as long as nothing changes; None where nothing can."""

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
    """An episode that was written, and what it was made from; ``refused`` is what ``videos.decord_refuses`` says of its
    videos."""

    refused: frozenset[str]
    made_from: object


@dataclass(frozen=True)
class _Task:
    """What a worker does with every job."""

    converter: Converter
    out: Path
    copy_videos: bool

    def __call__(self, job: Job) -> _Converted | Skipped | Failure:
        return _convert_one(self, job)


@dataclass
class Summary:
    """What became of the episodes of a source."""

    episodes: int
    already_there: int = 0
    changed: int = 0  # were there, and are converted anew
    converted: int = 0
    skipped: dict[str, str] = field(default_factory=dict)  # episode -> reason
    failed: list[Failure] = field(default_factory=list)
    refused: set[str] = field(default_factory=set)  # why decord cannot read videos of these episodes
    interrupted: bool = False

    def text(self) -> str:
        """A few lines for people."""
        head = f"{self.converted} converted, {self.already_there} already there, {len(self.skipped)} skipped"
        lines = [f"{head}, {len(self.failed)} failed, of {self.episodes} episodes"]
        if self.changed:
            lines.append(f"  their source has changed: {self.changed}, converted anew")
        lines += [f"  skipped {n}: {reason}" for reason, n in Counter(self.skipped.values()).most_common()]
        for rule, n in Counter(item.rule for item in self.failed).most_common():
            first = next(item for item in self.failed if item.rule == rule)
            lines.append(f"  failed {n}: {rule}; the first, {first.episode}: {first.message}")
        lines += [f"  videos {why}: train with --video_reader pyav" for why in sorted(self.refused)]
        if self.interrupted:
            lines.append("  interrupted; the same command goes on from here")
        return "\n".join(lines)


def run(
    converter: Converter,
    out: Path,
    workers: int,
    settings: Mapping[str, object],
    copy_videos: bool = False,
    done: str = "converted",
    shard: Shard | None = None,
) -> Summary:
    """Convert every episode of a source that ``out`` does not hold yet, or whose source has changed since.

    An episode is there whole or not at all, whatever kills the process. ``out/conversion.json`` records the settings
    and the outcome; ``Ctrl-C`` stops the workers and returns with ``interrupted`` set.

    Args:
        converter: reads the source.
        out: folder of the episode files; made where it is missing.
        workers: processes that convert.
        settings: what the episodes depend on (JSON-able); must be those that ``out`` was begun with, once it holds
            an episode.
        copy_videos: link or copy the videos that episodes refer to into ``out/videos``.
        done: what the progress line calls an episode that was written.
        shard: convert this part of the episodes alone, beside others; a run without takes up all parts.
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
    suffix = "" if shard is None else shard.suffix
    with _locked(out, suffix):
        settings = json.loads(json.dumps(dict(settings)))
        refused = _check_settings(out, settings)
        if shard is None:
            remove_leftovers(out)
        else:
            jobs = [job for number, job in enumerate(jobs) if shard.owns(number)]
        summary = Summary(len(jobs), refused=refused)
        provenance = Provenance(out, suffix)
        there = [job for job in jobs if (out / f"{job.name}{SUFFIX}").is_file()]
        current = {job.name for job in there if provenance.is_current(job.name, converter.made_from(job))}
        todo = [job for job in jobs if job.name not in current]
        summary.already_there, summary.changed = len(current), len(there) - len(current)
        write_record(out, settings, summary, "running", suffix)
        try:
            task = _Task(converter, out, copy_videos)
            _convert_all(task, todo, min(workers, len(todo)), summary, done, provenance)
        except KeyboardInterrupt:
            summary.interrupted = True
        if shard is None:
            remove_leftovers(out)  # of workers that were killed
        write_record(out, settings, summary, "interrupted" if summary.interrupted else "finished", suffix)
        if shard is None and not summary.interrupted:
            provenance.merge()
            for file in (*_of_parts(out, RECORD), *_of_parts(out, LOCK)):
                file.unlink()
    return summary


@contextlib.contextmanager
def _locked(out: Path, suffix: str) -> Iterator[None]:
    """Context in which no other conversion writes the same: the whole alone, a part beside other parts.

    Raises:
        DataError: one does.
    """
    with contextlib.ExitStack() as held:
        for name, mode in (("", fcntl.LOCK_SH), (suffix, fcntl.LOCK_EX)) if suffix else (("", fcntl.LOCK_EX),):
            lock = held.enter_context((out / LOCK.format(name)).open("w"))
            try:
                fcntl.flock(lock, mode | fcntl.LOCK_NB)
            except OSError as error:
                raise DataError(f"{out}: another conversion is writing there; wait for it", "location") from error
        yield


def _of_parts(out: Path, name: str) -> list[Path]:
    return sorted(out.glob(name.format(".*_of_*")))


# -- the output folder --------------------------------------------------------------------------------------------


def write_record(out: Path, settings: Mapping[str, object], summary: Summary, state: str, suffix: str = "") -> None:
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
    write_json(out / RECORD.format(suffix), content)


def _check_settings(out: Path, settings: dict) -> set[str]:
    """Raises DataError where ``out`` holds episodes of other settings; returns what decord refuses of its videos."""
    refused: set[str] = set()
    for record in (out / RECORD.format(""), *_of_parts(out, RECORD)):
        if record.is_file():
            refused |= _check_record(out, record, settings)
    return refused


def _check_record(out: Path, record: Path, settings: dict) -> set[str]:
    try:
        content = json.loads(record.read_text(encoding="utf-8"))
        begun, refused = dict(content["settings"]), set(content.get("videos_refused_by_decord", ()))
        recorded = content["converted"] + content["already_there"]
    except (ValueError, KeyError, TypeError) as error:
        what = f"is not the record of a conversion ({error}); remove it, or name another --out"
        raise DataError(f"{record}: {what}", "location") from error
    differing = describe_differences(begun, settings)
    if not differing:
        return refused
    # A conversion that was killed has not recorded its episodes: the files count too.
    if not recorded and not any(out.rglob(f"*{SUFFIX}")):
        return set()
    what = f"holds episodes of other settings ({differing}); name another --out, or remove that folder"
    raise DataError(f"{out}: {what}", "location")


# -- the parent's side --------------------------------------------------------------------------------------------


def _convert_all(task: _Task, jobs: list[Job], count: int, summary: Summary, done: str, provenance: Provenance) -> None:
    pending = deque(jobs)
    pool: list[WorkerProcess] = []
    progress = bar(total=summary.episodes, initial=summary.already_there, unit="episode")
    try:
        pool += [WorkerProcess(task) for _ in range(count)]
        while pool:
            for connection in wait([worker.connection for worker in pool]):
                worker = next(item for item in pool if item.connection is connection)
                finished = worker.job
                try:
                    outcome = worker.outcome()
                except WorkerDied as death:
                    if finished is None:  # every other would, too
                        what = f"a worker process {death} before its first episode; see its message above"
                        raise RuntimeError(what) from None
                    pool.remove(worker)
                    lost = Failure(finished.name, WORKER_DIED, f"the worker process {death} while converting it")
                    _account(finished, lost, summary, progress, done)
                    if pending:
                        pool.append(WorkerProcess(task))
                    continue
                if finished is not None:
                    if isinstance(outcome, _Converted):
                        provenance.add(finished.name, outcome.made_from)
                    _account(finished, outcome, summary, progress, done)
                if pending:
                    worker.give(pending.popleft())
                else:
                    worker.give(None)
                    pool.remove(worker)
    finally:
        progress.close()
        for worker in pool:
            worker.kill()


def _account(job: Job, outcome: _Converted | Skipped | Failure, summary: Summary, progress: tqdm, done: str) -> None:
    if isinstance(outcome, _Converted):
        summary.converted += 1
        summary.refused |= outcome.refused
    elif isinstance(outcome, Skipped):
        summary.skipped[job.name] = str(outcome)
    else:
        summary.failed.append(outcome)
        progress.write(f"{job.name}: {outcome.message}", file=sys.stderr)
    progress.update()
    progress.set_postfix({done: summary.converted, "skipped": len(summary.skipped), "failed": len(summary.failed)})


# -- the worker's side --------------------------------------------------------------------------------------------


def _convert_one(task: _Task, job: Job) -> _Converted | Skipped | Failure:
    path = task.out / f"{job.name}{SUFFIX}"
    try:
        made_from = task.converter.made_from(job)
        data = task.converter.convert(job)
        converted = _Converted(decord_refuses(data), made_from)
        path.parent.mkdir(parents=True, exist_ok=True)
        if task.copy_videos:
            data = with_own_videos(data, path, task.out)
        write_episode(path, data)
        if task.converter.made_from(job) != made_from:
            path.unlink()
            raise DataError("its source was changed while it was being read; run the same command again", "file")
    except Skipped as reason:
        return reason
    except DataError as error:
        return Failure(job.name, error.rule, str(error))
    except Exception as error:  # a fault of a library on this one file must not end the run
        place = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(place.filename).name}:{place.lineno}"
        return Failure(job.name, UNEXPECTED, f"{type(error).__name__} at {where}: {one_line(error, None)}")
    return converted
