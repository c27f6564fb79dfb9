"""What is known of the episodes of a location, kept in a file: opening 100,000 episodes takes seconds, not hours.

    python -m data_utils.index PATH [--workers N] [--full]

The index of a folder is ``<folder>/.apt_index/episodes.parquet``, or a file under ``~/.cache/apt/index`` where the
folder cannot be written. It is brought up to date whenever it is opened: folders whose modification time changed are
listed again, and new or changed files are checked, in processes of their own (``data_utils.checks``). A file that is
overwritten in place leaves its folder's time alone; ``--full`` looks at every file's size and time.
"""

from __future__ import annotations

import glob
import hashlib
import json
import logging
import os
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from tqdm import tqdm

from data_utils.checks.checker import FileChecker, Report, Request, check_files
from data_utils.data_loc import is_episode_name
from data_utils.errors import DataError

logger = logging.getLogger(__name__)

INDEX_VERSION = 1
INDEX_FOLDER = ".apt_index"
SETTLED_NS = 2_000_000_000  # a folder changed less than this ago may change again without a new time
SAVE_EVERY_S = 60.0
CHUNK = 5000  # files checked between two looks at the clock
SCHEMA = pa.schema(
    {
        "folder": pa.binary(),  # relative to the root, "" for the root itself; names need not be UTF-8
        "name": pa.binary(),
        "size": pa.int64(),
        "mtime_ns": pa.int64(),
        "length": pa.int32(),
        "num_ee": pa.int32(),
        "prompt": pa.string(),
        "cameras": pa.string(),  # JSON list
        "rule": pa.string(),  # "" where the file can be used
        "message": pa.string(),
        "camera_faults": pa.string(),  # JSON: camera -> [rule, message]; "" where there are none
    }
)


class EpisodeIndex:
    """Episodes of one location, checked; up to date when constructed.

    Args:
        path: a folder (with its sub-folders), a file, or a glob.
        checker: checks new files; None: the one that this process shares.
        full: look at every file's size and time.
    Raises:
        DataError: no episode files there.
    """

    def __init__(self, path: str | os.PathLike, checker: FileChecker | None = None, full: bool = False) -> None:
        self.path = os.path.abspath(os.fspath(path))
        self._check = check_files if checker is None else checker.check
        self.root = self.path if os.path.isdir(self.path) else _static_folder(self.path)
        self._beside, self._elsewhere = _index_files(self.path, self.root)
        self._rows, self._folders = SCHEMA.empty_table(), {}
        if not os.path.isfile(self.path):  # a single file is checked as fast as its index would be read
            # Made before the folders are listed, as it changes the root's time.
            self._writable = _try_make(self._beside.parent)
            self._read()
        self.refresh(full)

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def episodes(self) -> pa.Table:
        """One row per episode file, faulty ones included: ``path`` (absolute, bytes) and the columns of SCHEMA."""
        parts = [pa.scalar(os.fsencode(self.root)), self._rows["folder"], self._rows["name"]]
        path = pc.binary_join_element_wise(*parts, pa.scalar(b"/"))
        # The root's own files have the folder "".
        path = pc.replace_substring(path, pattern=b"//", replacement=b"/") if len(self._rows) else path
        return self._rows.drop_columns(["folder", "name"]).add_column(0, "path", path)

    def refresh(self, full: bool = False) -> int:
        """Bring the index up to date and store it where something changed; returns how many files were checked.

        Raises:
            DataError: no episode files there.
        """
        known = {} if full else self._folders
        try:
            folders, listed = self._scan(known)
        except OSError as error:
            raise DataError(f"{self.path} cannot be listed ({error}); check its permissions", "location") from error
        unchanged = pa.array([os.fsencode(folder) for folder in folders if folder not in listed], pa.binary())
        is_kept = pc.is_in(self._rows["folder"], value_set=unchanged)
        kept, other = self._rows.filter(is_kept), self._rows.filter(pc.invert(is_kept))
        keys = zip(*(other[name].to_pylist() for name in ("folder", "name", "size", "mtime_ns", "rule")), strict=True)
        # A full refresh looks again at files that could not be read at all: storage may have been at fault.
        before = {tuple(key): row for row, (*key, rule) in enumerate(keys) if not (full and rule == "file")}
        reused, new = [], []
        for folder, files in listed.items():
            for name, size, mtime_ns in files:
                key = (os.fsencode(folder), os.fsencode(name), size, mtime_ns)
                if key in before:
                    reused.append(before[key])
                else:
                    new.append(key)
        if not len(kept) + len(reused) + len(new):
            raise DataError(f"{self.path} matches no episode files; correct the path or put the data there", "location")
        rows = pa.concat_tables([kept, other.take(pa.array(reused, pa.int64()))])
        same = not new and len(rows) == len(self._rows)
        rows = self._check_new(rows, new)
        # In an order of their own, whatever was checked when.
        self._rows = rows.take(pc.sort_indices(rows, sort_keys=[("folder", "ascending"), ("name", "ascending")]))
        if not same or folders != self._folders:
            self._folders = folders
            self._store()
        return len(new)

    # -- finding files ------------------------------------------------------------------------------------------

    def _scan(self, known: dict[str, int]) -> tuple[dict[str, int], dict[str, list[tuple[str, int, int]]]]:
        """Modification time of every folder, and (name, size, mtime_ns) of the files of those that changed."""
        if self.path != self.root:
            return self._scan_glob(known)
        children: dict[str, list[str]] = {}
        for folder in known:
            if folder:
                children.setdefault(os.path.dirname(folder), []).append(folder)
        folders: dict[str, int] = {}
        listed: dict[str, list[tuple[str, int, int]]] = {}
        waiting: list[tuple[str, frozenset[int]]] = [("", frozenset())]
        while waiting:
            folder, above = waiting.pop()
            status = os.stat(os.path.join(self.root, folder))
            if status.st_ino in above:  # a link to a folder it lies in
                continue
            folders[folder] = _settled(status.st_mtime_ns)
            below = above | {status.st_ino}
            if known.get(folder) == status.st_mtime_ns:
                waiting += [(child, below) for child in children.get(folder, ())]
                continue
            listed[folder] = files = []
            with os.scandir(os.path.join(self.root, folder)) as entries:
                for entry in entries:
                    if entry.name.startswith("."):
                        continue
                    if entry.is_dir():
                        waiting.append((os.path.join(folder, entry.name), below))
                    elif is_episode_name(entry.name):
                        files += _file_status(entry.path, entry.name)
        return folders, listed

    def _scan_glob(self, known: dict[str, int]) -> tuple[dict[str, int], dict[str, list[tuple[str, int, int]]]]:
        names: dict[str, list[str]] = {}
        for path in [self.path] if os.path.isfile(self.path) else glob.glob(self.path, recursive=True):
            folder, name = os.path.split(path)
            if path == self.path or is_episode_name(name):
                names.setdefault(os.path.relpath(folder, self.root).removeprefix("."), []).append(name)
        folders, listed = {}, {}
        for folder, found in names.items():
            mtime_ns = os.stat(os.path.join(self.root, folder)).st_mtime_ns
            folders[folder] = _settled(mtime_ns)
            if known.get(folder) != mtime_ns:
                listed[folder] = [
                    status for name in found for status in _file_status(os.path.join(self.root, folder, name), name)
                ]
        return folders, listed

    # -- checking files -----------------------------------------------------------------------------------------

    def _check_new(self, rows: pa.Table, new: list[tuple[bytes, bytes, int, int]]) -> pa.Table:
        """``rows`` and those of the ``new`` files, which are checked; stored now and then, should this be ended."""
        if not new:
            return rows
        saved, lock = time.monotonic(), threading.Lock()
        # Shown when it takes a while; a log file gets a line every half minute.
        with tqdm(
            total=len(new), desc=f"checking {self.path}", unit="file", delay=3.0,
            mininterval=0.5 if sys.stderr.isatty() else 30.0,
        ) as bar:  # fmt: skip

            def done() -> None:
                with lock:
                    bar.update()

            for first in range(0, len(new), CHUNK):
                chunk = new[first : first + CHUNK]
                root = os.fsencode(self.root)
                requests = [Request(os.fsdecode(os.path.join(root, folder, name))) for folder, name, _, _ in chunk]
                rows = pa.concat_tables([rows, _rows_of(chunk, self._check(requests, done))])
                if time.monotonic() - saved > SAVE_EVERY_S:
                    self._rows, self._folders = rows, {}
                    self._store()
                    saved = time.monotonic()
        return rows

    # -- the file -----------------------------------------------------------------------------------------------

    def _read(self) -> None:
        """Take over the newer of the stored indexes, if there is one that can be trusted."""
        files = [file for file in (self._beside, self._elsewhere) if file.is_file()]
        if not files:
            return
        file = max(files, key=lambda file: file.stat().st_mtime_ns)
        try:
            rows = pq.read_table(file, use_threads=False)
            stored = json.loads((rows.schema.metadata or {}).get(b"apt_index", b"{}"))
            rows = rows.replace_schema_metadata(None)
            if stored.get("version") != INDEX_VERSION or not rows.schema.equals(SCHEMA):
                raise ValueError("it is of another version")
        except (pa.ArrowException, OSError, ValueError) as error:
            logger.warning("%s is not a usable index (%s); it is built again", file, " ".join(str(error).split()))
            return
        self._rows = rows
        # In a copy of the data the folders' times say nothing.
        if stored["path"] == self.path and stored["inode"] == os.stat(self.root).st_ino:
            self._folders = stored["folders"]

    def _store(self) -> None:
        if os.path.isfile(self.path):
            return
        stored = {"version": INDEX_VERSION, "path": self.path, "inode": os.stat(self.root).st_ino}
        stored["folders"] = self._folders
        rows = self._rows.replace_schema_metadata({"apt_index": json.dumps(stored)})
        file = self._beside if self._writable else self._elsewhere
        temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with open(temporary, "wb") as stream:
                pq.write_table(rows, stream, compression="zstd")
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(temporary, file)
        except OSError as error:  # a full disk must not keep anybody from training
            temporary.unlink(missing_ok=True)
            logger.warning("the index of %s could not be stored (%s); opening it takes as long again", self.path, error)


def check_paths(paths: Iterable[str | os.PathLike]) -> pa.Table:
    """Check files that are named one by one: rows as in :attr:`EpisodeIndex.episodes`, in the order given.

    A file that is not there is a faulty episode.
    """
    paths = [os.fspath(path) for path in paths]
    keys = []
    for path in paths:
        status = _file_status(path, path)
        keys.append((b"", os.fsencode(path), *(status[0][1:] if status else (0, 0))))
    rows = _rows_of(keys, check_files([Request(path) for path in paths]))
    return rows.drop_columns(["folder", "name"]).add_column(0, "path", rows["name"])


def _rows_of(keys: Sequence[tuple[bytes, bytes, int, int]], reports: Sequence[Report]) -> pa.Table:
    columns = {name: [key[index] for key in keys] for index, name in enumerate(("folder", "name", "size", "mtime_ns"))}
    for name in ("length", "num_ee", "prompt", "rule", "message"):
        columns[name] = [getattr(report, name) for report in reports]
    columns["cameras"] = [json.dumps(report.cameras) for report in reports]
    columns["camera_faults"] = [json.dumps(report.camera_faults) if report.camera_faults else "" for report in reports]
    return pa.table(columns, schema=SCHEMA)


def _file_status(path: str, name: str) -> list[tuple[str, int, int]]:
    """(name, size, mtime_ns) of a file, nothing where it has just been removed."""
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return []
    return [(name, status.st_size, status.st_mtime_ns)]


def _settled(mtime_ns: int) -> int:
    """The time to remember for a folder; -1, which is no folder's, while it may still change unnoticed."""
    return mtime_ns if mtime_ns < time.time_ns() - SETTLED_NS else -1


def _static_folder(pattern: str) -> str:
    """The longest leading folder of a file's path or a glob that holds no wildcard."""
    folder = os.path.dirname(pattern)
    while glob.has_magic(folder):
        folder = os.path.dirname(folder)
    return folder


def _index_files(path: str, root: str) -> tuple[Path, Path]:
    """Where the index of ``path`` may be: beside the data, and in the user's cache."""
    digest = hashlib.sha256(os.fsencode(path)).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    beside = Path(root) / INDEX_FOLDER / ("episodes.parquet" if path == root else f"glob_{digest}.parquet")
    return beside, cache / "apt" / "index" / f"{digest}.parquet"


def _try_make(folder: Path) -> bool:
    """Whether ``folder`` is there, made now if need be, and can be written."""
    try:
        folder.mkdir(exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK)
