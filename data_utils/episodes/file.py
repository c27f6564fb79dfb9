"""The HDF5 side of an episode file: open it, read arrays and single items, compare them with their checksums.

Whatever HDF5 finds wrong becomes a :class:`DataError` that names the file, the key and the frame.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import h5py
import numpy as np

from data_utils.episodes import schema
from data_utils.errors import DataError
from data_utils.words import one_line

_RESEAL = "python -m data_utils.inspect FILE --reseal"
_UNSEALED = f"record it again, or, if it was changed on purpose, renew its checksums ({_RESEAL})"


class CheckedFile:
    """An HDF5 file in the project's schema, open for reading.

    Attributes:
        path: the file.
        attributes: of the file, as stored.
        checksums: key -> CRC-32 of every array the file was written with (None: checked item by item); empty before
            schema version 2.

    Raises:
        DataError: no such file, not HDF5, of a version not known, or attributes that are not what was written.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise DataError(f"{self.path}: no such episode file; check the dataset's location", "file")
        try:
            self._file = h5py.File(self.path, "r")
        except OSError as error:
            what = f"not a readable HDF5 file ({one_line(error)}); record it again"
            raise DataError(f"{self.path}: {what}", "file") from error
        self._datasets: dict[str, h5py.Dataset] = {}
        self._readers: dict[str, Callable[[int], np.ndarray]] = {}
        self._item_checksums: dict[str, np.ndarray] = {}
        self.checksums: dict[str, int | None] = {}
        try:
            with self.reading("header"):
                self.attributes = dict(self._file.attrs)
                self._check_version()
        except BaseException:
            self._file.close()
            raise

    @property
    def is_checksummed(self) -> bool:
        return bool(self.checksums)

    def close(self) -> None:
        # The file looks for every handle that is still open, which takes longer than to drop them.
        self._datasets.clear()
        self._readers.clear()
        self._file.close()

    def _check_version(self) -> None:
        version = self.attributes.get(schema.VERSION_ATTR, 0)
        if not isinstance(version, int | np.integer) or not 0 <= version <= schema.SCHEMA_VERSION:
            what = f"is {version}; this library reads up to {schema.SCHEMA_VERSION}: update it, or record again"
            raise self.fault(f"attribute {schema.VERSION_ATTR}", what, "version")
        if version >= 2:
            stored = self.attributes.get(schema.ATTRIBUTES_CHECKSUM_ATTR)
            if stored is None or int(stored) != schema.attributes_checksum(self.attributes):
                raise self.fault("attributes", f"are not what was written; {_UNSEALED}", "checksum")
            self.checksums = schema.parse_checksums(self.attributes[schema.CHECKSUMS_ATTR])

    # -- what is there ----------------------------------------------------------------------------------------------

    def has(self, key: str) -> bool:
        """Whether a key is there, or ought to be."""
        return key in self.checksums or key in self._file

    def groups(self) -> list[str]:
        """Names of the groups at the top."""
        return [name for name, item in self._file.items() if isinstance(item, h5py.Group)]

    def is_open(self, key: str) -> bool:
        """Whether :meth:`open` was called for ``key``."""
        return key in self._datasets

    def dtype(self, key: str) -> np.dtype:
        """Type of an open dataset."""
        return self._datasets[key].dtype

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of an open dataset."""
        return self._datasets[key].shape

    def open(self, key: str, kinds: str | None = None, shape: tuple | None = None) -> tuple[tuple, np.dtype]:
        """Open and keep the dataset ``key``; returns its shape and type, both checked where given."""
        try:
            # The low-level call takes half the time of file[key], which matters for a hundred thousand headers.
            handle = h5py.h5d.open(self._file.id, key.encode())
        except (KeyError, ValueError) as error:
            raise self.fault(key, "is missing or not an array; every such file needs it") from error
        except (OSError, RuntimeError) as error:
            what = f"cannot be read ({one_line(error)}); the file is damaged"
            raise self.fault(key, what, "file") from error
        with self.reading(key):
            found, dtype = handle.shape, handle.dtype
        if kinds is not None and dtype.kind not in kinds:
            raise self.fault(key, f"has type {dtype}; wanted {'floats' if kinds == 'f' else 'numbers'}")
        if shape is not None and found != shape:
            raise self.fault(key, f"has shape {found}; wanted {shape} to agree with ee_pose")
        self._datasets[key] = h5py.Dataset(handle)
        return found, dtype

    # -- reading ----------------------------------------------------------------------------------------------------

    def array(self, key: str) -> np.ndarray:
        """An open dataset as stored, compared with its checksum where the file has one; texts as (N,) objects."""
        dataset = self._datasets[key]
        with self.reading(key):
            dtype = dataset.dtype
            if dtype.kind in "fiub":
                # The low-level call takes a fifth of the time of dataset[()].
                array = np.empty(dataset.id.shape, dtype)
                dataset.id.read(h5py.h5s.ALL, h5py.h5s.ALL, array)
            else:
                array = (dataset.asstr() if is_text(dtype) else dataset)[()]
        if self.is_checksummed and self.checksums.get(key) != schema.array_checksum(array):
            raise self.fault(key, f"is not what was written; {_UNSEALED}", "checksum")
        return array

    def item(self, key: str, index: int) -> np.ndarray:
        """Item ``index`` of an open dataset, compared with its checksum; several threads may read at once."""
        with self.reading(key, index):
            if key not in self._readers:
                dataset = self._datasets[key]
                self._readers[key] = _ItemReader(dataset) if is_jpeg(dataset.dtype) else dataset.__getitem__
            data = self._readers[key](index)
        if self.is_checksummed:
            if key not in self._item_checksums:
                self._item_checksums[key] = self.array(schema.FRAME_CHECKSUMS.format(key=key))
            if int(self._item_checksums[key][index]) != schema.array_checksum(data):
                raise self.fault(key, f"at frame {index} is not what was written; {_UNSEALED}", "checksum")
        return data

    # -- errors -----------------------------------------------------------------------------------------------------

    def fault(self, key: str, what: str, rule: str = "schema") -> DataError:
        """The error about ``key``."""
        return DataError(f"{self.path}: {key.lstrip('/')} {what}", rule)

    @contextlib.contextmanager
    def reading(self, key: str, frame: int | None = None) -> Iterator[None]:
        """HDF5 reports damage with many exception types; all become one that names the place."""
        try:
            yield
        except DataError:
            raise
        except (OSError, RuntimeError, KeyError, ValueError, TypeError, MemoryError, OverflowError) as error:
            where = "" if frame is None else f" at frame {frame}"
            what = f"cannot be read{where} ({one_line(error)}); the file is damaged"
            raise self.fault(key, what, "file") from error


def is_text(dtype: np.dtype) -> bool:
    """Whether a dataset of this type holds texts."""
    return h5py.check_string_dtype(dtype) is not None


def is_jpeg(dtype: np.dtype) -> bool:
    """Whether a dataset of this type holds byte strings of any length."""
    return h5py.check_vlen_dtype(dtype) == np.uint8


class _ItemReader:
    """Reads single items of a one-dimensional dataset, with the selection and type prepared once."""

    def __init__(self, dataset: h5py.Dataset) -> None:
        self._id, self._dtype = dataset.id, dataset.dtype
        self._space = self._id.get_space()
        self._one = h5py.h5s.create_simple((1,))
        self._type = h5py.h5t.py_create(self._dtype)
        self._lock = threading.Lock()  # between choosing the item and reading it

    def __call__(self, index: int) -> np.ndarray:
        out = np.empty(1, self._dtype)
        with self._lock:
            self._space.select_hyperslab((index,), (1,))
            self._id.read(self._one, self._space, out, self._type)
        return out[0]
