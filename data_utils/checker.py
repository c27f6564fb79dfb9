"""Check episode files in processes of their own: damaged HDF5 metadata can crash the HDF5 library, or hang it.

``python -m data_utils.checker`` is such a process. It reads requests and writes answers, one JSON object per line.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import queue
import resource
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

# A further process is worth its start, half a second, from so many files on.
FILES_PER_PROCESS = {"header": 32, "frames": 4, "sampled": 8, "deep": 2}
DEPTHS = tuple(FILES_PER_PROCESS)
MEMORY_LIMIT = 16 << 30  # damaged sizes must not take the machine's memory
ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Request:
    """What to check.

    Args:
        path: the episode file.
        depth: "header": what opening checks, and every small array; "frames": every frame and mask too. Both stop at
            the first fault of each camera. "deep": all faults (``data_utils.validate``), what is unusual, and what the
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
        camera_faults: camera -> (rule, message) of cameras that cannot be used in a file that can.
        faults, warnings: (rule, message) of all that is wrong and all that is unusual, without the file's name. Of
            "deep" and "sampled", as is
        contents: ``data_utils.inspection.contents.Contents`` as a dictionary; {} where the file cannot be read so far.
    """

    length: int = 0
    num_ee: int = 0
    prompt: str = ""
    cameras: tuple[str, ...] = ()
    rule: str = ""
    message: str = ""
    camera_faults: dict[str, tuple[str, str]] = field(default_factory=dict)
    faults: tuple[tuple[str, str], ...] = ()
    warnings: tuple[tuple[str, str], ...] = ()
    contents: dict = field(default_factory=dict)


class FileChecker:
    """Feeds files to checking processes, which start when they are needed and again after a file has ended them.

    Args:
        workers: processes at most; None: one per core, 16 at most.
        timeout: seconds without a sign of life after which a file counts as one that hangs the reader.
    """

    def __init__(self, workers: int | None = None, timeout: float = 60.0) -> None:
        cores = len(os.sched_getaffinity(0))
        self.workers = min(cores, 16) if workers is None else workers
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
                    what = f"reading it{place} crashes the HDF5 library ({_ending(code)}); record it again"
                    return Report(rule="file", message=f"{request.path}: {what}")
                continue
            answer["cameras"] = tuple(answer["cameras"])
            answer["camera_faults"] = {name: tuple(fault) for name, fault in answer["camera_faults"].items()}
            for name in ("faults", "warnings"):
                answer[name] = tuple(tuple(item) for item in answer[name])
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
            [sys.executable, "-m", "data_utils.checker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            # One thread each: the processes are the parallelism.
            env={**os.environ, "PYTHONPATH": path, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
            start_new_session=True,  # a Ctrl-C is for the parent, whose end closes stdin
        )
        try:
            self._receive()
        except (EOFError, TimeoutError) as error:
            self.close()
            raise RuntimeError("the checking process did not start; run python -m data_utils.checker to see") from error

    def _receive(self) -> dict:
        """One answer. Raises ``TimeoutError`` after silence, ``EOFError`` where the process has ended."""
        while b"\n" not in self._received:
            if not select.select([self._process.stdout], [], [], self.timeout)[0]:
                raise TimeoutError
            data = os.read(self._process.stdout.fileno(), 1 << 16)
            if not data:
                raise EOFError
            self._received += data
        line, self._received = self._received.split(b"\n", 1)
        return json.loads(line)


def _ending(code: int) -> str:
    if code < 0:
        return signal.Signals(-code).name
    return f"exit code {code}"


# -- inside the checking process ------------------------------------------------------------------------------------


def inspect_file(request: Request, at: Callable[[str], None]) -> Report:
    """Check one file in this process; ``at(place)`` is told of every frame before it is read."""
    from data_utils.errors import DataError
    from data_utils.h5io import Episode

    if request.depth in ("deep", "sampled"):
        return _examine_file(request, at)

    def read(cameras: Sequence[str] | None) -> Report:
        with Episode(request.path, cameras, request.video_root) as episode:
            _read_small_arrays(episode)
            if request.depth == "frames":
                for camera in episode.cameras:
                    for index in range(len(episode)):
                        at(f"{camera} frame {index}")
                        episode.rgb(camera, index)
                        episode.mask(camera, index)
            return Report(len(episode), episode.num_ee, episode.prompts[0], episode.cameras)

    try:
        return read(None)
    except DataError as error:
        fault = error
    try:
        whole = read(())
        names = _camera_names(request.path)
    except (DataError, OSError, RuntimeError):
        return Report(rule=fault.rule, message=str(fault))
    camera_faults = {}
    for name in names:
        try:
            read((name,))
        except DataError as error:
            camera_faults[name] = (error.rule, str(error))
    if not camera_faults:  # what is wrong is in none of the parts
        return Report(rule=fault.rule, message=str(fault))
    return Report(whole.length, whole.num_ee, whole.prompt, tuple(names), camera_faults=camera_faults)


def _examine_file(request: Request, at: Callable[[str], None]) -> Report:
    from data_utils.errors import DataError
    from data_utils.inspection.contents import read_contents
    from data_utils.inspection.unusual import find_warnings
    from data_utils.validate import find_faults
    from data_utils.video import VideoCache

    path, root, videos = request.path, request.video_root, VideoCache("pyav", max_open=2)
    wanted = request.ee_indices or None
    faults = find_faults(path, request.cameras, root, videos, request.depth == "deep", wanted, at)
    at("contents")
    try:
        contents = read_contents(path, videos, root)
    except DataError as error:
        if not faults:
            raise AssertionError(f"{path} passed every check, yet cannot be read: {error}") from error
        return Report(faults=_pairs(faults))
    at("warnings")
    warnings = [] if faults else find_warnings(path, videos, root)
    videos.close()
    return Report(
        length=contents.frames,
        num_ee=contents.num_ee,
        prompt=contents.prompts[0],
        cameras=tuple(contents.cameras),
        faults=_pairs(faults),
        warnings=_pairs(warnings),
        contents=asdict(contents),
    )


def _pairs(found) -> tuple[tuple[str, str], ...]:
    return tuple((item.rule, item.message) for item in found)


def _read_small_arrays(episode) -> None:
    """Read what checks itself when it is first read."""
    for name in ("timestamps", "world_from_ee", "gripper", "world_from_ee_desired", "gripper_desired", "ee_indices"):
        getattr(episode, name)
    for camera in episode.cameras:
        episode.world_from_cam(camera, 0)
        episode.K(camera, 0)
        if episode.is_video(camera):
            episode.video_location(camera, 0)
    _ = episode.subtasks


def _camera_names(path: str) -> list[str]:
    import h5py

    with h5py.File(path, "r") as file:
        return [name for name, item in file.items() if isinstance(item, h5py.Group) and "rgb" in item]


def main() -> None:
    """Serve requests until stdin ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # What a library prints must not be taken for an answer.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    import cv2

    import data_utils.h5io  # noqa: F401  before the first answer, so that its time is not a file's

    cv2.setNumThreads(0)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, resource.getrlimit(resource.RLIMIT_AS)[1]))
    print(json.dumps({"ready": True}), file=answers)
    for line in sys.stdin:
        values, timeout = json.loads(line)
        request = Request(**values)

        def beat(place: str | None = None, seconds: int = 2 * int(timeout) + 1) -> None:
            # Should the parent be gone by then, nobody else ends a reader that hangs.
            signal.alarm(seconds)
            if place is not None:
                print(json.dumps({"at": place}), file=answers)

        beat()
        try:
            report = inspect_file(request, beat)
        except Exception as error:  # whatever a damaged file brings up, the next file must be checked
            what = f"cannot be checked ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
            report = Report(rule="file", message=f"{request.path}: {what}; record it again")
        signal.alarm(0)
        print(json.dumps(asdict(report)), file=answers)


if __name__ == "__main__":
    main()
