"""Suites and tasks of the benchmarks: goal files, instructions and stored initial states, read without importing
the benchmarks' packages."""

from __future__ import annotations

import functools
import importlib.util
import io
import json
import pickle
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath

import numpy as np

from examples.errors import SimulatorError
from examples.libero.bddl import Problem, UnusableTask, read_bddl
from examples.libero.benchmarks import Perturbation, find_benchmark, perturbation
from examples.libero.environment import libero_root

# What the pickle inside an initial-state file needs to be an array; it may build nothing else.
_ALLOWED = {
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("_codecs", "encode"),
}


@dataclass(frozen=True)
class LiberoTask:
    """One task of a suite.

    Args:
        suite: one of :func:`suite_names`.
        task_id: its number in the suite, in the benchmark's order.
        name: stem of its files; in LIBERO-plus, with what was changed.
        root: folder of the benchmark's package.
        benchmark: a key of ``BENCHMARKS``.
    """

    suite: str
    task_id: int
    name: str
    root: Path
    benchmark: str = "libero"

    @property
    def perturbation(self) -> Perturbation | None:
        """What LIBERO-plus changed."""
        return perturbation(self.name) if self.benchmark == "libero-plus" else None

    @property
    def scene_file(self) -> Path:
        """What the benchmark's package builds the scene from; LIBERO-plus reads cameras and noise off the name."""
        return self.root / "bddl_files" / self.suite / f"{self.name}.bddl"

    @property
    def bddl_file(self) -> Path:
        return self.scene_file.with_name(f"{self.name.partition('_view_')[0]}.bddl")

    @property
    def problem(self) -> Problem:
        """What the goal file says. Raises ``SimulatorError`` for an unusable one."""
        return read_bddl(self.bddl_file)

    @property
    def language(self) -> str:
        """The instruction as the benchmark gives it.

        LIBERO's is the file's name in words, without a leading ``..._SCENEn``; so is LIBERO-plus's, less what tells
        the perturbation, except where the instruction itself was rewritten. That, and LIBERO-PRO's, is the goal file's.
        """
        changed = self.perturbation
        if self.benchmark == "libero-pro" or (changed is not None and changed.rewritten):
            return self.problem.language
        return re.sub(r"^[A-Z].*?SCENE\d+_", "", changed.base if changed else self.name).replace("_", " ")

    def initial_states(self) -> np.ndarray:
        """The benchmark's initial MuJoCo states (N, D) float64. Raises ``SimulatorError`` for an unusable file,
        ``UnusableTask`` for an empty one."""
        folder, changed = self.root / "init_files", self.perturbation
        if changed is not None and changed.new_objects:
            return read_initial_states(folder / "libero_newobj" / self.suite / f"{self.name}.pruned_init")
        return read_initial_states(folder / self.suite / f"{changed.base if changed else self.name}.pruned_init")

    @property
    def fault(self) -> str | None:
        """Why the task, as its package ships it, cannot be run; None where it can.

        LIBERO-PRO ships four tasks without initial states, three of them with a goal file that does not parse either.
        """
        try:
            self.initial_states()
            _ = self.problem
        except UnusableTask as error:
            return str(error)
        return None


def suite_names(benchmark: str = "libero") -> list[str]:
    """The installed suites of a benchmark: those it knows and has goal files for, the reported ones first.

    Raises ``SimulatorError`` where its package is missing.
    """
    root = libero_root(benchmark)
    present = [suite for suite in _task_names(root) if (root / "bddl_files" / suite).is_dir()]
    reported = find_benchmark(benchmark).suites
    return sorted(present, key=lambda suite: reported.index(suite) if suite in reported else len(reported))


def suite_tasks(suite: str, benchmark: str = "libero") -> list[LiberoTask]:
    """The tasks of a suite in the benchmark's order. Raises ``SimulatorError`` for an unknown one."""
    root = libero_root(benchmark)
    names = _task_names(root)
    if suite not in names or suite not in suite_names(benchmark):
        there = ", ".join(suite_names(benchmark))
        raise SimulatorError(f"there is no {benchmark} suite {suite!r}; there are {there}")
    return [LiberoTask(suite, number, name, root, benchmark) for number, name in enumerate(names[suite])]


def find_task(bddl_file: str, benchmark: str = "libero") -> LiberoTask:
    """The installed task of a BDDL file that may have been named on another machine: its base name counts, and its
    folder's where several suites have a task of that name.

    Raises ``SimulatorError`` where no suite has such a task.
    """
    path = PureWindowsPath(bddl_file)  # understands both kinds of slashes
    stem = path.name.removesuffix(".bddl")
    found = [task for suite in suite_names(benchmark) for task in suite_tasks(suite, benchmark) if task.name == stem]
    if not found:
        what = f"no {benchmark} suite has a task {stem!r} (from {bddl_file!r})"
        raise SimulatorError(f"{what}; its BDDL file is not installed")
    return next((task for task in found if task.suite == path.parent.name), found[0])


def read_difficulties(path: Path) -> dict[tuple[str, str], int | None]:
    """(Suite, task's name) -> level, 1 to 5 or None, from LIBERO-plus's ``task_classification.json``.

    Raises ``SimulatorError`` for a file that is missing or something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return {
            (suite, entry["name"]): None if entry["difficulty_level"] is None else int(entry["difficulty_level"])
            for suite, entries in content.items()
            for entry in entries
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        what = f"{path}: is not LIBERO-plus's classification of tasks ({type(error).__name__}: {error})"
        raise SimulatorError(f"{what}; it is libero/libero/benchmark/task_classification.json of its repo") from error


def read_initial_states(path: Path) -> np.ndarray:
    """States (N, D) float64 from one of LIBERO's files: a zip with a pickled array.

    Raises ``SimulatorError`` where the file is missing, damaged or holds anything but an array, and
    ``UnusableTask`` where the array is empty.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            name = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
            states = _ArrayUnpickler(io.BytesIO(archive.read(name))).load()
    except (OSError, zipfile.BadZipFile, StopIteration, pickle.UnpicklingError, EOFError) as error:
        what = f"holds no initial states ({error or type(error).__name__})"
        raise SimulatorError(f"{path}: {what}; install LIBERO's package again") from error
    if isinstance(states, np.ndarray) and states.size == 0:
        raise UnusableTask(f"{path}: was shipped without initial states")
    if isinstance(states, np.ndarray) and states.ndim == 1 and states.dtype.kind == "f":
        states = states[None]  # LIBERO-plus: the one state of a task
    if not isinstance(states, np.ndarray) or states.ndim != 2:
        raise SimulatorError(f"{path}: holds {type(states).__name__}; wanted an array (N, D) of initial states")
    return states.astype(np.float64)


class _ArrayUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str):
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no array needs")
        return super().find_class(module, name)


@functools.lru_cache(maxsize=8)
def _task_names(root: Path) -> dict[str, list[str]]:
    # By path: importing the package around this file would import torch.
    spec = importlib.util.spec_from_file_location(
        "libero_suite_task_map", root / "benchmark" / "libero_suite_task_map.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.libero_task_map
