"""Records on disk that several processes of a machine read and write at once: an LMDB of limited size.

LMDB's transactions are atomic: a process killed at any moment leaves whole records alone. Its locks need a local disk;
a folder on a network file system must not be shared between machines.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from train_utils.errors import ConfigError

# Address space, not disk: above any limit, so that runs with different limits can share a folder.
_MAP_SIZE = 2**44
_PAGE_HEADER = 16  # bytes of its first page that a large record does not use


class FeatureStore:
    """Byte records by key; nothing is ever replaced or removed.

    Once ``limit`` is reached nothing more is added. Were old records replaced instead, a run over more data than fit
    would find few of them when their turn comes again; as it is, it finds as large a share as fits.

    Args:
        folder: made where there is none.
        limit: bytes that the folder's file may grow to.
        threads: that read at the same time.
    Raises:
        ConfigError: lmdb is not installed, or the folder cannot be opened.
    """

    def __init__(self, folder: str | Path, limit: float, threads: int = 1) -> None:
        try:
            import lmdb
        except ImportError as error:
            raise ConfigError(
                "cache_vlm_features needs the package lmdb, which is not installed: pip install lmdb"
            ) from error
        self.folder, self.limit = Path(folder), limit
        self.is_full = False
        self._damage, self._no_space = lmdb.Error, lmdb.DiskError
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            # Data reach the disk before the page that makes them known: not even a power cut leaves half a record.
            self._env = lmdb.open(str(self.folder), map_size=_MAP_SIZE, metasync=False, max_spare_txns=threads)
            self._env.reader_check()  # forget readers that were killed
        except (OSError, lmdb.Error) as error:
            raise ConfigError(
                f"feature cache {self.folder} cannot be opened ({error}); give --cache_vlm_features a writable folder "
                "on a local disk, or remove a damaged one"
            ) from error
        self._page = self._env.stat()["psize"]

    def __len__(self) -> int:
        return self._env.stat()["entries"]

    @property
    def num_bytes(self) -> int:
        """Size of the file."""
        return (self._env.info()["last_pgno"] + 1) * self._page

    def read_into(self, key: bytes, out: np.ndarray) -> bool:
        """Copy a record to ``out`` (any uint8 array of as many bytes); False where there is none.

        Raises:
            ConfigError: the record has another size, or the file is damaged.
        """
        try:
            with self._env.begin(buffers=True) as transaction:
                record = transaction.get(key)
                if record is None:
                    return False
                if len(record) != out.size:
                    raise ConfigError(
                        f"feature cache {self.folder} holds a record of {len(record)} bytes where {out.size} belong; "
                        "remove the folder"
                    )
                out[...] = np.frombuffer(record, np.uint8).reshape(out.shape)
                return True
        except self._damage as error:
            raise self._is_damaged(error) from error

    def add(self, records: Iterable[tuple[bytes, np.ndarray]]) -> None:
        """Add what is new of these records, in one transaction, up to the limit; a full disk counts as the limit."""
        try:
            with self._env.begin(write=True) as transaction:
                free = self.limit - self.num_bytes
                for key, record in records:
                    free -= -(-(record.nbytes + _PAGE_HEADER) // self._page) * self._page
                    if free < 0:
                        self.is_full = True
                        break
                    transaction.put(key, np.ascontiguousarray(record).data, overwrite=False)
        except self._no_space:
            self.is_full = True
        except self._damage as error:
            raise self._is_damaged(error) from error

    def _is_damaged(self, error: Exception) -> ConfigError:
        return ConfigError(f"feature cache {self.folder} is damaged ({error}); remove the folder")

    def close(self) -> None:
        self._env.close()
