"""Check episode files in processes of their own: damaged HDF5 metadata can crash the HDF5 library, or hang it.

This is the side that asks. ``python -m data_utils.checks`` is such a process: it reads requests and writes answers, one
JSON object per line.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import queue
import select
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from data_utils.cli import cores
from data_utils.errors import Fault
from data_utils.words import ending

# A further process is worth its start, half a second, from so many files on.
FILES_PER_PROCESS = {"header": 32, "frames": 4, "sampled": 8, "deep": 2}
DEPTHS = tuple(FILES_PER_PROCESS)
ROOT = Path(__file__).resolve().parents[2]


_START = 60.0  # seconds, which an interpreter may take on a busy machine


@dataclass(frozen=True)
class Request:
    """What to check.

    Args:
        path: the episode file.
        depth: "header": what opening checks, and every small array; "frames": every frame and mask too. Both stop at
            the first fault of each camera. "deep": all faults (``faults.py``), what is unusual, and what the
            file holds; "sampled": the same, decoding few frames.
        video_root: folder of the videos; None: what the file says.
        cameras, ee_indices: what a dataset class wants of the file; (): nothing. Of "deep" and "sampled".
    """

    path: str
    depth: str = "header"
    video_root: str | None = None
    cameras: tuple[str, ...] = ()
    ee_indices: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.depth not in DEPTHS:
            raise ValueError(f"depth is {self.depth!r}; wanted one of {', '.join(DEPTHS)}")


@dataclass(frozen=True)
class Report:
    """What a file holds and what is wrong with it.

    Args:
        length, num_ee: frames and end-effectors; 0 where the file cannot be read so far.
        prompt: its first instruction.
        cameras: every camera the file has, the faulty ones too.
        rule, message: the fault that makes the whole file unusable; "" where there is none.
        camera_faults: of cameras that cannot be used in a file that can; the messages name the file.
        faults, warnings: all that is wrong and all that is unusual. Of "deep" and "sampled", as is
        contents: ``data_utils.checks.contents.Contents`` as a dictionary; {} where the file cannot be read so far.
    """

    length: int = 0
    num_ee: int = 0
    prompt: str = ""
    cameras: tuple[str, ...] = ()
    rule: str = ""
    message: str = ""
    camera_faults: dict[str, Fault] = field(default_factory=dict)
    faults: tuple[Fault, ...] = ()
    warnings: tuple[Fault, ...] = ()
    contents: dict = field(default_factory=dict)


class FileChecker:
    """Feeds files to checking processes, which start when they are needed and again after a file has ended them.

    Args:
        workers: processes at most; None: one per core, 16 at most.
        timeout: seconds without a sign of life after which a file counts as one that hangs the reader.
    """

    def __init__(self, workers: int | None = None, timeout: float = 60.0) -> None:
        self.workers = min(cores(), 16) if workers is None else workers
        if self.workers < 1:
            raise ValueError(f"workers is {workers}; it must be at least 1")
        self.timeout = timeout
        self._children: list[_Child] = []
        self._lock = threading.Lock()

    def check(self, requests: Sequence[Request], done: Callable[[], object] | None = None) -> list[Report]:
        """Reports in the order of the requests; ``done`` is called after each file, from several threads."""
        with self._lock:
            share = min((FILES_PER_PROCESS[request.depth] for request in requests), default=1)
            wanted = min(self.workers, 1 + (len(requests) - 1) // share) if requests else 0
            while len(self._children) < wanted:
                self._children.append(_Child(self.timeout))
            reports: list[Report | None] = [None] * len(requests)
            waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
            for index in range(len(requests)):
                waiting.put(index)
            errors: list[BaseException] = []
            stop = threading.Event()

            def feed(child: _Child) -> None:
                try:
                    while not stop.is_set():
                        index = waiting.get_nowait()
                        reports[index] = child.check(requests[index])
                        if done is not None:
                            done()
                except queue.Empty:
                    return
                except BaseException as error:  # handed to the caller below
                    errors.append(error)
                    stop.set()

            threads = [threading.Thread(target=feed, args=(child,), daemon=True) for child in self._children[:wanted]]
            for thread in threads:
                thread.start()
            try:
                for thread in threads:
                    thread.join()
            except BaseException:
                stop.set()
                self._close_children(keep=0)
                raise
            self._close_children(keep=1)
        if errors:
            raise errors[0]
        return reports

    def close(self) -> None:
        """End the processes; a later check starts new ones."""
        self._close_children(keep=0)

    def __enter__(self) -> "FileChecker":
        return self

    def __exit__(self, *exc) -> None:
        self.close()

    def _close_children(self, keep: int) -> None:
        for child in self._children[keep:]:
            child.close()
        del self._children[keep:]


def check_files(requests: Sequence[Request], done: Callable[[], object] | None = None) -> list[Report]:
    """:meth:`FileChecker.check` by processes of which one stays for the next call, until this process ends."""
    return _shared_checker(os.getpid()).check(requests, done)


@functools.cache
def _shared_checker(pid: int) -> FileChecker:
    """``pid`` makes a forked process start checkers of its own."""
    checker = FileChecker()
    atexit.register(checker.close)
    return checker


class _Child:
    """One checking process, seen from outside."""

    def __init__(self, timeout: float) -> None:
        self.timeout = timeout
        self._process: subprocess.Popen | None = None
        self._received = b""

    def check(self, request: Request) -> Report:
        for attempt in range(2):
            if self._process is None:
                self._start()
            try:
                self._process.stdin.write(json.dumps([asdict(request), self.timeout]).encode() + b"\n")
                self._process.stdin.flush()
                place = ""
                while "at" in (answer := self._receive()):
                    place = f" at {answer['at']}"
            except TimeoutError:
                self.close()
                what = f"reading it{place} takes more than {self.timeout:g} s; remove it or record it again"
                return Report(rule="file", message=f"{request.path}: {what}")
            except (EOFError, BrokenPipeError):
                code = self._process.wait()
                self.close()
                # Somebody may have ended the process; a file that ends it twice is the reason.
                if attempt == 1:
                    what = f"reading it{place} crashes the HDF5 library: the process {ending(code)}; record it again"
                    return Report(rule="file", message=f"{request.path}: {what}")
                continue
            answer["cameras"] = tuple(answer["cameras"])
            answer["camera_faults"] = {name: Fault(*fault) for name, fault in answer["camera_faults"].items()}
            for name in ("faults", "warnings"):
                answer[name] = tuple(Fault(*item) for item in answer[name])
            return Report(**answer)
        raise AssertionError("unreachable: the second attempt returns")

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for stream in (self._process.stdin, self._process.stdout):
                try:
                    stream.close()
                except BrokenPipeError:  # a request that was never read
                    continue
            self._process, self._received = None, b""

    def _start(self) -> None:
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        self._process = subprocess.Popen(
            [sys.executable, "-m", "data_utils.checks"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            # One thread each: the processes are the parallelism.
            env={**os.environ, "PYTHONPATH": path, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
            start_new_session=True,  # a Ctrl-C is for the parent, whose end closes stdin
        )
        try:
            self._receive(least=_START)
        except (EOFError, TimeoutError) as error:
            self.close()
            raise RuntimeError("the checking process did not start; run python -m data_utils.checks to see") from error

    def _receive(self, least: float = 0.0) -> dict:
        """One answer. Raises ``TimeoutError`` after silence (of ``least`` seconds at least), ``EOFError`` where the
        process has ended."""
        while b"\n" not in self._received:
            if not select.select([self._process.stdout], [], [], max(self.timeout, least))[0]:
                raise TimeoutError
            data = os.read(self._process.stdout.fileno(), 1 << 16)
            if not data:
                raise EOFError
            self._received += data
        line, self._received = self._received.split(b"\n", 1)
        return json.loads(line)
