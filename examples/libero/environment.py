"""Where LIBERO is: the interpreter that has it, its files, its assets and its settings folder.

LIBERO needs numpy < 2 and so an environment of its own. Commands that simulate call :func:`enter_libero` first.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import importlib.util
import io
import os
import sys
from pathlib import Path
from types import ModuleType

import yaml

from data_utils.files import cache_root, write_text
from examples.errors import SimulatorError
from examples.headless import import_headless
from examples.libero.benchmarks import find_benchmark

ROOT = Path(__file__).parents[2]
VENV = ROOT / ".venv-libero"
SETUP = "bash examples/libero/setup.sh"
_PINS = Path(__file__).with_name("requirements.txt")
MAGICK = "libmagickwand-6.q16-6 (newer systems: libmagickwand-7.q16-10)"
_PHYSICS = ("mujoco", "robosuite", "bddl")


def enter_libero(command: str) -> None:
    """Make sure that this interpreter has LIBERO, or go on in one that has.

    Where LIBERO is missing and this process runs ``python -m command``, the process is replaced by the same command
    line under ``.venv-libero``.

    Raises:
        SimulatorError: there is no LIBERO here, and no ``.venv-libero`` to go on in.
    """
    if importlib.util.find_spec("libero") is not None:
        return
    python = VENV / "bin" / "python"
    spec = sys.modules["__main__"].__spec__
    is_command = spec is not None and spec.name in (command, f"{command}.__main__")
    if not is_command or not python.is_file() or Path(sys.prefix).resolve() == VENV.resolve():
        raise SimulatorError(f"this needs the LIBERO simulator; run: {SETUP}")
    sys.stdout.flush()
    sys.stderr.flush()
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    os.execve(python, [str(python), "-m", command, *sys.argv[1:]], {**os.environ, "PYTHONPATH": path})


def libero_root(benchmark: str = "libero") -> Path:
    """Folder of a benchmark's package, with ``bddl_files``, ``init_files`` and ``assets``; imports nothing of it.

    Raises ``SimulatorError`` where this interpreter lacks the package, or there is no such benchmark.
    """
    known = find_benchmark(benchmark)
    spec = importlib.util.find_spec(known.package)
    if spec is None or spec.origin is None:
        raise SimulatorError(f"{benchmark} needs the package {known.distribution}; run: {SETUP}")
    return Path(spec.origin).parent / known.package


def check_assets(benchmark: str = "libero") -> None:
    """Raises ``SimulatorError`` where a benchmark's meshes and textures are not in place."""
    assets = libero_root(benchmark) / "assets"
    if not (assets / "scenes").is_dir():
        raise SimulatorError(f"{benchmark}'s meshes and textures are not at {assets}; {assets_hint(benchmark)}")


def assets_hint(benchmark: str) -> str:
    """What to do where some of a benchmark's meshes or textures are missing."""
    known = find_benchmark(benchmark)
    if known.assets_flag is None:
        return f"run: {SETUP}"
    return f"get them ({known.assets_origin}) and run: {SETUP} {known.assets_flag} DIR"


def versions(benchmark: str = "libero") -> dict[str, str]:
    """Distribution -> version, of everything that an episode's outcome depends on."""
    names = (*_PHYSICS, find_benchmark(benchmark).distribution)
    return {name: importlib.metadata.version(name) for name in names}


def unpinned(versions: dict[str, str]) -> list[str]:
    """A line of warning for every package whose version is not the pinned one, which results depend on."""
    pins = dict(line.split("==") for line in _PINS.read_text(encoding="utf-8").split() if "==" in line)
    return [
        f"warning: {name} is {version}, not the pinned {pins[name]}: results may differ from others'"
        for name, version in versions.items()
        if name in pins and version != pins[name]
    ]


def import_simulator(benchmark: str = "libero") -> ModuleType:
    """``examples.libero.simulator``, imported with a headless OpenGL; its environments are of ``benchmark``'s tasks.

    Raises ``SimulatorError`` or ``ImportError`` that say what to install.
    """
    check_assets(benchmark)
    return import_headless("examples.libero.simulator", SETUP)


def import_scenes(benchmark: str) -> tuple[ModuleType, ModuleType]:
    """The modules with which a benchmark's package builds scenes and reads goal files: ``env_wrapper`` and
    ``bddl_utils``. It finds its settings in place.

    Raises ``SimulatorError`` or ``ImportError`` that say what to install.
    """
    check_assets(benchmark)
    _write_settings(benchmark)
    if benchmark == "libero-plus":
        _check_image_noise()
    package = find_benchmark(benchmark).package
    with contextlib.redirect_stderr(io.StringIO()):  # gym's advice to migrate, at each import
        return tuple(
            import_headless(f"{package}.{package}.envs.{module}", SETUP) for module in ("env_wrapper", "bddl_utils")
        )


def _check_image_noise() -> None:
    """LIBERO-plus's package draws noise with ImageMagick, and is not imported without it."""
    try:
        importlib.import_module("wand.api")
    except ImportError as error:
        what = "libero-plus needs ImageMagick for its image noise, and the packages that go with it"
        raise SimulatorError(f"{what}; run: apt-get install {MAGICK}, and {SETUP}") from error


def _write_settings(benchmark: str) -> None:
    """The packages read paths from ``$LIBERO_CONFIG_PATH/config.yaml``, each when it is imported; some releases ask for
    them on standard input where the file is missing. Each gets a folder of its own: its paths are its own."""
    root = libero_root(benchmark)
    folder = cache_root() / benchmark
    content = yaml.safe_dump(
        {
            "benchmark_root": str(root),
            "bddl_files": str(root / "bddl_files"),
            "init_states": str(root / "init_files"),
            "datasets": str(root.parent / "datasets"),
            "assets": str(root / "assets"),
        }
    )
    file = folder / "config.yaml"
    os.environ["LIBERO_CONFIG_PATH"] = str(folder)
    if file.is_file() and file.read_text(encoding="utf-8") == content:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(file, content)
    except OSError as error:
        what = f"LIBERO's settings cannot be written to {folder} ({error.strerror})"
        raise SimulatorError(f"{what}; set XDG_CACHE_HOME to a writable folder") from error
