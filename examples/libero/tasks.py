"""LIBERO's suites and tasks: goal files, instructions and stored initial states, read without importing LIBERO."""

from __future__ import annotations

import importlib.util
import io
import pickle
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath

import numpy as np

from examples.errors import SimulatorError
from examples.libero.environment import libero_root

SUITES = ("libero_spatial", "libero_object", "libero_goal", "libero_10", "libero_90")
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
        suite: one of :data:`SUITES`.
        task_id: its number in the suite, in the benchmark's order.
        name: stem of its files.
        root: folder of LIBERO's package.
    """

    suite: str
    task_id: int
    name: str
    root: Path

    @property
    def bddl_file(self) -> Path:
        return self.root / "bddl_files" / self.suite / f"{self.name}.bddl"

    @property
    def language(self) -> str:
        """The instruction as the benchmark gives it: the file's name in words, without a leading ``..._SCENEn``."""
        return re.sub(r"^[A-Z].*?SCENE\d+_", "", self.name).replace("_", " ")

    def initial_states(self) -> np.ndarray:
        """The benchmark's initial MuJoCo states (N, D) float64. Raises ``SimulatorError`` for an unusable file."""
        return read_initial_states(self.root / "init_files" / self.suite / f"{self.name}.pruned_init")


def suite_tasks(suite: str) -> list[LiberoTask]:
    """The tasks of a suite in the benchmark's order. Raises ``SimulatorError`` for an unknown one."""
    root = libero_root()
    names = _task_names(root)
    if suite not in names:
        raise SimulatorError(f"there is no LIBERO suite {suite!r}; there are {', '.join(SUITES)}")
    return [LiberoTask(suite, number, name, root) for number, name in enumerate(names[suite])]


def find_task(bddl_file: str) -> LiberoTask:
    """The installed task of a BDDL file that may have been named on another machine: only its base name counts.

    Raises ``SimulatorError`` where no suite has such a task.
    """
    stem = PureWindowsPath(bddl_file).name.removesuffix(".bddl")  # understands both kinds of slashes
    for suite in SUITES:
        for task in suite_tasks(suite):
            if task.name == stem:
                return task
    raise SimulatorError(f"no LIBERO suite has a task {stem!r} (from {bddl_file!r}); its BDDL file is not installed")


def read_initial_states(path: Path) -> np.ndarray:
    """States (N, D) float64 from one of LIBERO's files: a zip with a pickled array.

    Raises ``SimulatorError`` where the file is missing, empty, damaged or holds anything but an array.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            name = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
            states = _ArrayUnpickler(io.BytesIO(archive.read(name))).load()
    except (OSError, zipfile.BadZipFile, StopIteration, pickle.UnpicklingError, EOFError) as error:
        what = f"holds no initial states ({error or type(error).__name__})"
        raise SimulatorError(f"{path}: {what}; install LIBERO's package again") from error
    if not isinstance(states, np.ndarray) or states.ndim != 2:
        raise SimulatorError(f"{path}: holds {type(states).__name__}; wanted an array (N, D) of initial states")
    return states.astype(np.float64)


class _ArrayUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str):
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no array needs")
        return super().find_class(module, name)


def _task_names(root: Path) -> dict[str, list[str]]:
    # By path: importing the package around this file would import torch.
    spec = importlib.util.spec_from_file_location(
        "libero_suite_task_map", root / "benchmark" / "libero_suite_task_map.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.libero_task_map
