"""robomimic's HDF5 files to episode files: the groups ``data/demo_i`` by a mapping file, images as they are stored."""

from __future__ import annotations

import dataclasses
import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import h5py
import numpy as np
import tyro

from data_utils.convert.assemble import assemble
from data_utils.convert.mapping import (
    calibration_files,
    check_files,
    check_robots,
    load_mapping,
    mapping_content,
    robot_files,
)
from data_utils.convert.provenance import state_of
from data_utils.convert.runner import Job
from data_utils.errors import DataError
from data_utils.h5io import EpisodeData
from data_utils.words import one_line

SUFFIXES = (".hdf5", ".h5")


@dataclass(frozen=True)
class RobomimicSettings:
    """What to convert, and how its datasets are to be understood."""

    src: Path
    """An HDF5 file, or a folder of them."""
    mapping: str
    """Mapping file; its columns are dataset names below data/demo_i, such as obs/robot0_eef_pos."""
    calibration: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Folder of the calibration files that the mapping names; that of the HDF5 files where it is not given."""
    filter_key: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    """Only the demonstrations listed under mask/NAME (train, valid, ...)."""


class RobomimicConverter:
    """One episode file ``FILE/demo_000012`` per demonstration."""

    def __init__(self, settings: RobomimicSettings) -> None:
        self._mapping, self._mapping_file = load_mapping(settings.mapping)
        self._settings = settings
        source = settings.src.resolve()
        folder = source if source.is_dir() else source.parent
        self._files = (
            sorted(item for item in source.iterdir() if item.suffix in SUFFIXES) if source.is_dir() else [source]
        )
        if not self._files or not self._files[0].is_file():
            raise DataError(f"{source}: no HDF5 file there; --src is a file, or a folder of them", "location")
        self._calibration = settings.calibration.resolve() if settings.calibration is not None else folder
        self._open: tuple[Path, h5py.File] | None = None

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_open": None}

    def described(self) -> dict:
        """The settings, with the content of the mapping in place of its name."""
        settings = {**dataclasses.asdict(self._settings), "src": self._settings.src.resolve()}
        return {**settings, "mapping": mapping_content(self._mapping_file), "calibration": self._calibration}

    def jobs(self) -> list[Job]:
        check_files(self._mapping, self._mapping_file, self._calibration)
        check_robots(self._mapping, self._mapping_file)
        stems = Counter(path.stem for path in self._files)
        found = []
        for path in self._files:
            folder = path.stem if stems[path.stem] == 1 else path.name.replace(".", "_")
            numbered = [(name, int(re.sub(r"\D", "", name) or 0)) for name in self._demonstrations(path)]
            alike = Counter(number for _, number in numbered)
            for name, number in numbered:  # one file each, whatever they are called
                own = f"demo_{number:06d}" if alike[number] == 1 else re.sub(r"[^\w-]", "_", name)
                found.append(Job(f"{folder}/{own}", (str(path), name, number)))
        if len({job.name for job in found}) < len(found):
            again = next(job for index, job in enumerate(found) if job.name in {other.name for other in found[:index]})
            raise DataError(
                f"{again.key[0]}: several demonstrations would be called {again.name}; rename one", "schema"
            )
        return found

    def made_from(self, job: Job) -> dict:
        path, _, number = job.key
        calibration = calibration_files(self._mapping, self._calibration, number)
        return {"files": state_of([path, *calibration, *robot_files(self._mapping, self._mapping_file)])}

    def convert(self, job: Job) -> EpisodeData:
        path, name, number = job.key
        recording = _Demonstration(self._file(Path(path)), Path(path), name, number)
        attributes = {"source": f"robomimic: {Path(path).name}", "source_episode": name}
        attributes["mapping"] = self._mapping_file.name
        return assemble(self._mapping, recording, self._calibration, self._mapping_file, attributes)

    def _demonstrations(self, path: Path) -> list[str]:
        """Names of the demonstrations, by their numbers."""
        key = self._settings.filter_key
        try:
            with h5py.File(path, "r") as file:
                if "data" not in file:
                    raise DataError(f"{path}: has no group 'data'; is it a robomimic file?", "schema")
                names = list(file["data"])
                if key is not None:
                    if f"mask/{key}" not in file:
                        there = ", ".join(file["mask"]) if "mask" in file else "none"
                        raise DataError(f"{path}: has no filter key {key!r}; there are {there}", "schema")
                    names = [item.decode() for item in file[f"mask/{key}"][()].tolist()]
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({one_line(error)})", "file") from error
        return sorted(names, key=lambda name: (int(re.sub(r"\D", "", name) or 0), name))

    def _file(self, path: Path) -> h5py.File:
        """Kept open: frames are read after ``convert`` has returned."""
        if self._open is None or self._open[0] != path:
            try:
                self._open = (path, h5py.File(path, "r"))
            except OSError as error:
                raise DataError(f"{path}: cannot be read ({one_line(error)})", "file") from error
        return self._open[1]


class _Demonstration:
    """The datasets of one demonstration (see ``data_utils.convert.values.Recording``)."""

    video_root = None

    def __init__(self, file: h5py.File, path: Path, name: str, number: int) -> None:
        self.place, self.index = f"{path} {name}", number
        try:
            self._group = file[f"data/{name}"]
            found: dict[str, h5py.Dataset] = {}
            self._group.visititems(
                lambda key, item: found.update({key: item}) if isinstance(item, h5py.Dataset) else None
            )
            self.length = int(self._group.attrs.get("num_samples", 0)) or len(self._group["actions"])
            self._attributes = {**file["data"].attrs, **self._group.attrs}
        except (KeyError, OSError, RuntimeError) as error:
            raise DataError(f"{self.place}: cannot be read ({one_line(error)})", "file") from error
        if self.length < 1:
            raise DataError(f"{self.place}: has no frames (num_samples, or else its actions)", "schema")
        self._datasets = {key: item for key, item in found.items() if item.shape}
        self.columns = tuple(self._datasets)
        self.fps = _control_frequency(self._attributes.get("env_args"))

    def _of(self, column: str) -> h5py.Dataset:
        dataset = self._datasets[column]
        if dataset.shape[0] != self.length:
            what = f"dataset {column!r} has {dataset.shape[0]} rows, the demonstration {self.length}"
            raise self._fault(f"{what} (num_samples, or else its actions)", "schema")
        return dataset

    def numbers(self, column: str) -> np.ndarray:
        dataset = self._of(column)
        if dataset.dtype.kind not in "fiub":
            raise self._fault(f"dataset {column!r} holds {dataset.dtype}; wanted numbers", "schema")
        return np.asarray(self._read(dataset, column, slice(None)), np.float64).reshape(self.length, -1)

    def texts(self, column: str) -> list[str]:
        dataset = self._of(column)
        if h5py.check_string_dtype(dataset.dtype) is None:
            raise self._fault(f"dataset {column!r} holds {dataset.dtype}; wanted texts", "prompt")
        return list(dataset.asstr()[()])

    def first(self, column: str) -> object:
        return np.asarray(self._read(self._of(column), column, 0)).tolist()

    def task(self) -> str:
        raise self._fault("robomimic stores no instruction; give the mapping a prompt with a text", "prompt")

    def of_episode(self, key: str) -> object:
        if key not in self._attributes:
            raise self._fault(f"has no attribute {key!r}; there are {', '.join(self._attributes)}", "prompt")
        return str(self._attributes[key])

    def frame_size(self, column: str) -> tuple[int, int]:
        shape = self._images(column).shape
        return shape[2], shape[1]

    def frames(self, column: str, flip_rows: bool) -> Sequence[np.ndarray]:
        dataset = self._images(column)
        return _Frames(lambda index: self._read(dataset, column, index), self.length, flip_rows)

    def _images(self, column: str) -> h5py.Dataset:
        dataset = self._of(column)
        if dataset.dtype != np.uint8 or dataset.ndim != 4 or dataset.shape[3] != 3:
            what = f"dataset {column!r} is {dataset.dtype} {dataset.shape}; wanted ({self.length}, H, W, 3) uint8"
            raise self._fault(what, "image")
        return dataset

    def _read(self, dataset: h5py.Dataset, column: str, what: slice | int) -> np.ndarray:
        try:
            return dataset[what]
        except (OSError, RuntimeError) as error:
            raise self._fault(f"dataset {column!r} cannot be read ({one_line(error)})", "file") from error

    def _fault(self, what: str, rule: str) -> DataError:
        return DataError(f"{self.place}: {what}", rule)


class _Frames(Sequence):
    """Frames read when asked for; ``flip_rows`` for those that MuJoCo stored upside down."""

    def __init__(self, read, length: int, flip_rows: bool) -> None:
        self._read, self._length, self._flip_rows = read, length, flip_rows

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> np.ndarray:
        if not 0 <= index < self._length:
            raise IndexError(index)
        image = self._read(index)
        return image[::-1] if self._flip_rows else image


def _control_frequency(env_args: str | None) -> float | None:
    """Frames per second, where the file says how its environment was driven."""
    try:
        return float(json.loads(env_args)["env_kwargs"]["control_freq"])
    except (TypeError, ValueError, KeyError):
        return None
