"""What is known of the episodes of a location, kept in a file: opening 100,000 episodes takes seconds, not hours.

    python -m data_utils.index PATH [--workers N] [--full] [--shard I/N]

The index of a folder is ``<folder>/.apt_index/episodes.parquet``, or a file under ``~/.cache/apt/index`` where the
folder cannot be written. It is brought up to date whenever it is opened: folders whose modification time changed are
listed again, and new or changed files are checked, in processes of their own (``data_utils.checks``). A file that is
overwritten in place leaves its folder's time alone; ``--full`` looks at every file's size and time. What parts
(``data_utils.shards``) have checked lies beside the index until the whole is opened, which takes it up.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import threading
import time
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_utils.checks.checker import FileChecker, Report, Request, check_files
from data_utils.cli import bar
from data_utils.errors import DataError
from data_utils.files import atomic_write
from data_utils.index.scan import file_status, scan, static_folder
from data_utils.shards import Shard
from data_utils.words import one_line

logger = logging.getLogger(__name__)

INDEX_VERSION = 1
INDEX_FOLDER = ".apt_index"
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
        shard: check a part of the files alone, and keep them for whoever opens the whole.
    Raises:
        DataError: no episode files there; a part of a place that cannot be written to.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        checker: FileChecker | None = None,
        full: bool = False,
        shard: Shard | None = None,
    ) -> None:
        self.path = os.path.abspath(os.fspath(path))
        self._check = check_files if checker is None else checker.check
        self.root = self.path if os.path.isdir(self.path) else static_folder(self.path)
        self._beside, self._elsewhere = _index_files(self.path, self.root)
        self._shard, self._parts, self._of_parts = shard, [], SCHEMA.empty_table()
        self._rows, self._folders = SCHEMA.empty_table(), {}
        if not os.path.isfile(self.path):  # a single file is checked as fast as its index would be read
            # Made before the folders are listed, as it changes the root's time.
            self._writable = _try_make(self._beside.parent)
            self._read_all()
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
            folders, listed = scan(self.path, self.root, known)
        except OSError as error:
            raise DataError(f"{self.path} cannot be listed ({error}); check its permissions", "location") from error
        unchanged = pa.array([os.fsencode(folder) for folder in folders if folder not in listed], pa.binary())
        is_kept = pc.is_in(self._rows["folder"], value_set=unchanged)
        kept, other = self._rows.filter(is_kept), self._rows.filter(pc.invert(is_kept))
        other = pa.concat_tables([other, self._of_parts])
        keys = zip(*(other[name].to_pylist() for name in ("folder", "name", "size", "mtime_ns", "rule")), strict=True)
        # A full refresh looks again at files that could not be read at all: storage may have been at fault.
        before = {tuple(key): row for row, (*key, rule) in enumerate(keys) if not (full and rule == "file")}
        reused, new = [], []
        for folder, files in listed.items():
            for name, size, mtime_ns in files:
                if not self._owns(folder, name):
                    continue
                key = (os.fsencode(folder), os.fsencode(name), size, mtime_ns)
                if key in before:
                    reused.append(before[key])
                else:
                    new.append(key)
        if not any(listed.values()) and not len(kept):
            raise DataError(f"{self.path} matches no episode files; correct the path or put the data there", "location")
        rows = pa.concat_tables([kept, other.take(pa.array(reused, pa.int64()))])
        same = not new and len(rows) == len(self._rows) and not self._parts
        rows = self._check_new(rows, new)
        # In an order of their own, whatever was checked when.
        self._rows = rows.take(pc.sort_indices(rows, sort_keys=[("folder", "ascending"), ("name", "ascending")]))
        if not same or folders != self._folders:
            self._folders = folders
            self._store()
        return len(new)

    # -- checking files -----------------------------------------------------------------------------------------

    def _check_new(self, rows: pa.Table, new: list[tuple[bytes, bytes, int, int]]) -> pa.Table:
        """``rows`` and those of the ``new`` files, which are checked; stored now and then, should this be ended."""
        if not new:
            return rows
        saved, lock = time.monotonic(), threading.Lock()
        with bar(total=len(new), desc=f"checking {self.path}", unit="file", delay=3.0) as checked:

            def done() -> None:
                with lock:
                    checked.update()

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

    def _owns(self, folder: str, name: str) -> bool:
        return self._shard is None or self._shard.owns(zlib.crc32(os.fsencode(os.path.join(folder, name))))

    def _read_all(self) -> None:
        """Take over the newer of the stored indexes, and what parts have left."""
        files = [file for file in (self._beside, self._elsewhere) if file.is_file()]
        if files:
            newest = max(files, key=lambda file: file.stat().st_mtime_ns)
            self._rows, self._folders = _read(newest, self.path, self.root)
        if self._shard is None:
            parts = self._parts = list(self._beside.parent.glob(f"{self._beside.stem}.*_of_*.parquet"))
        elif not self._writable:
            what = f"{self._beside.parent} cannot be written to, where the index of a part has to lie"
            raise DataError(f"{what}; make it writable, or leave out --shard", "location")
        else:
            self._beside = self._beside.with_name(f"{self._beside.stem}{self._shard.suffix}.parquet")
            self._folders = {}  # those are the whole's
            parts = [self._beside] if self._beside.is_file() else []
        tables = [_read(part, self.path, self.root)[0] for part in parts]
        self._of_parts = pa.concat_tables([self._of_parts, *tables])

    def _store(self) -> None:
        if os.path.isfile(self.path):
            return
        stored = {"version": INDEX_VERSION, "path": self.path, "inode": os.stat(self.root).st_ino}
        stored["folders"] = self._folders
        rows = self._rows.replace_schema_metadata({"apt_index": json.dumps(stored)})
        file = self._beside if self._writable else self._elsewhere
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            atomic_write(file, lambda temporary: pq.write_table(rows, temporary, compression="zstd"))
        except OSError as error:  # a full disk must not keep anybody from training
            logger.warning("the index of %s could not be stored (%s); opening it takes as long again", self.path, error)
            return
        for part in self._parts:
            part.unlink(missing_ok=True)
        self._parts = []


def _read(file: Path, path: str, root: str) -> tuple[pa.Table, dict[str, int]]:
    """Rows of a stored index, and the folders' times; neither where it cannot be trusted."""
    try:
        rows = pq.read_table(file, use_threads=False)
        stored = json.loads((rows.schema.metadata or {}).get(b"apt_index", b"{}"))
        rows = rows.replace_schema_metadata(None)
        if stored.get("version") != INDEX_VERSION or not rows.schema.equals(SCHEMA):
            raise ValueError("it is of another version")
    except (pa.ArrowException, OSError, ValueError) as error:
        logger.warning("%s is not a usable index (%s); it is built again", file, one_line(error, None))
        return SCHEMA.empty_table(), {}
    # In a copy of the data the folders' times say nothing.
    here = stored["path"] == path and stored["inode"] == os.stat(root).st_ino
    return rows, stored["folders"] if here else {}


def check_paths(paths: Iterable[str | os.PathLike]) -> pa.Table:
    """Check files that are named one by one: rows as in :attr:`EpisodeIndex.episodes`, in the order given.

    A file that is not there is a faulty episode.
    """
    paths = [os.fspath(path) for path in paths]
    keys = []
    for path in paths:
        status = file_status(path, path)
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
