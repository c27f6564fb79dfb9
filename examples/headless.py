"""Choosing a headless OpenGL for MuJoCo, and importing the simulator without its chatter."""

from __future__ import annotations

import ctypes
import importlib
import logging
import os
import sys
import warnings
from types import ModuleType

from examples.errors import SimulatorError

_LIBRARIES = {"egl": ("libEGL.so.1",), "osmesa": ("libOSMesa.so.8", "libOSMesa.so.6", "libOSMesa.so")}
INSTALL_GL = "apt-get install libosmesa6 (or libegl1 libgl1-mesa-dri)"


def select_gl() -> str:
    """Sets ``MUJOCO_GL`` for this process and its children and returns it: ``egl`` or ``osmesa``.

    A value already set is respected. Otherwise EGL is taken where there is a graphics device, and OSMesa, which
    needs none, elsewhere. Raises ``SimulatorError`` where neither library is installed or the value is neither.
    """
    chosen = os.environ.get("MUJOCO_GL", "").lower().strip()
    if not chosen:
        has_device = os.path.exists("/dev/dri") or os.path.exists("/dev/nvidiactl")
        order = ("egl", "osmesa") if has_device else ("osmesa", "egl")
        chosen = next((name for name in order if _loads(_LIBRARIES[name])), "")
        if not chosen:
            raise SimulatorError(f"no headless OpenGL library found for the simulator; run: {INSTALL_GL}")
    if chosen not in _LIBRARIES:
        raise SimulatorError(f"MUJOCO_GL={chosen} cannot render without a screen; set it to egl or osmesa, or unset it")
    os.environ["MUJOCO_GL"] = chosen
    return chosen


def import_headless(name: str, install: str) -> ModuleType:
    """The module ``name``, which imports robosuite, imported with a headless OpenGL.

    Raises ``ImportError`` where robosuite, MuJoCo or an OpenGL library is missing; ``install`` is the command that
    its message tells the user to run for a missing Python package.
    """
    gl = select_gl()
    loaded = sys.modules.get("mujoco.gl_context")
    if loaded is not None and loaded.GLContext.__module__ != f"mujoco.{gl}":
        raise ImportError(
            f"mujoco was imported before with {loaded.GLContext.__module__}, which cannot be changed any more; "
            f"set MUJOCO_GL={gl} before anything imports mujoco or robosuite"
        )
    # robosuite asks, as a warning at each import, for a file of private settings; nothing here needs one.
    logging.getLogger("robosuite_logs").addFilter(_is_not_about_macros)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=DeprecationWarning)  # in how robosuite logs that request
            return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ImportError(f"the simulator needs {(error.name or '').partition('.')[0]}; run: {install}") from error
    except (AttributeError, ImportError, OSError) as error:  # PyOpenGL's ways of saying that a library is missing
        raise ImportError(f"MUJOCO_GL={gl} did not load ({error}); run: {INSTALL_GL}") from error


def _is_not_about_macros(record: logging.LogRecord) -> bool:
    return record.module != "macros"


def _loads(names: tuple[str, ...]) -> bool:
    """Whether a shared library is installed under one of its ``names``."""
    for name in names:
        try:
            ctypes.CDLL(name)
        except OSError:
            continue
        return True
    return False
