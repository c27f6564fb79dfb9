"""Pictures and the names and places of what they show: what a vision-language model learns to point with.

A set is a folder of parts, ``part_00000`` and so on, each written whole by one process:

    scenes.json    cameras, size, sentences with the kinds of things as fields ("put the {object} in the {container}")
    images.npy     (N, Ncam, H, W, 3) uint8
    things.jsonl   a line per scene: [{"name": "red cube", "kind": "object", "places": [[0.31, 0.55], null]}, ...]

A place is (u, v) as shares of an image's width and height from its upper left corner, one per camera; null where the
camera does not show the thing.
"""

from __future__ import annotations

import json
import shutil
import string
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from data_utils.errors import DataError
from data_utils.files import read_json, write_json

VERSION = 1
PART = "part_{:05d}"

Place = tuple[float, float] | None


@dataclass(frozen=True)
class Thing:
    """Something in a scene that can be named."""

    name: str
    kind: str
    """A field of the sentences."""
    places: tuple[Place, ...]
    """Per camera."""


@dataclass(frozen=True)
class SetDescription:
    """What all scenes of a set share.

    Raises ``ValueError`` for a sentence without fields.
    """

    cameras: tuple[str, ...]
    image_size: int
    sentences: tuple[str, ...]

    def __post_init__(self) -> None:
        for sentence in self.sentences:
            if not fields(sentence):
                raise ValueError(f"the sentence {sentence!r} names nothing; write kinds in braces, like {{object}}")


def fields(sentence: str) -> list[str]:
    """The kinds that a sentence has fields for, in its order."""
    return [field for _, field, _, _ in string.Formatter().parse(sentence) if field]


def write_part(
    folder: Path, number: int, description: SetDescription, count: int, scenes: Iterator[tuple[np.ndarray, list[Thing]]]
) -> Path:
    """Write ``count`` scenes, images (Ncam, H, W, 3) uint8 and things each; the part appears when it is whole."""
    part = folder / PART.format(number)
    building = folder / f".{part.name}.tmp"
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    shape = (count, len(description.cameras), description.image_size, description.image_size, 3)
    images = np.lib.format.open_memmap(building / "images.npy", "w+", np.uint8, shape)
    with open(building / "things.jsonl", "w", encoding="utf-8") as lines:
        for index in range(count):
            images[index], things = next(scenes)
            lines.write(json.dumps([asdict(thing) for thing in things]) + "\n")
    images.flush()
    write_json(building / "scenes.json", {"version": VERSION, **asdict(description)})
    building.rename(part)
    return part


def parts_of(folder: Path) -> list[Path]:
    """The whole parts of a set, in order."""
    return sorted(path for path in folder.glob("part_*") if path.is_dir())


class SceneSet:
    """Scenes of some parts; images stay on disk until they are asked for.

    Raises:
        DataError: no parts, parts that differ in cameras, size or sentences, or one that is damaged.
    """

    def __init__(self, parts: Sequence[Path]) -> None:
        if not parts:
            raise DataError("no scenes; render some first, for example: python -m examples.blocks.scenes", "location")
        self.things: list[list[Thing]] = []
        self._images: list[np.ndarray] = []
        self._first: list[int] = []
        self.description: SetDescription | None = None
        for part in parts:
            description = self._add(part)
            if self.description not in (None, description):
                raise DataError(f"{part}: has other cameras, sizes or sentences than {parts[0]}", "schema")
            self.description = description

    def _add(self, part: Path) -> SetDescription:
        try:
            values = read_json(part / "scenes.json")
            if values.pop("version") != VERSION:
                raise ValueError("it is of another version")
            description = SetDescription(tuple(values["cameras"]), values["image_size"], tuple(values["sentences"]))
            images = np.load(part / "images.npy", mmap_mode="r")
            lines = (part / "things.jsonl").read_text(encoding="utf-8").splitlines()
            things = [[_thing(item) for item in json.loads(line)] for line in lines]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{part}: is no part of a set of scenes ({error}); render it again", "file") from error
        side = description.image_size
        if images.shape != (len(things), len(description.cameras), side, side, 3):
            raise DataError(f"{part}: images {images.shape} do not fit {len(things)} lines of things", "schema")
        self._first.append(len(self.things))
        self._images.append(images)
        self.things += things
        return description

    def __len__(self) -> int:
        return len(self.things)

    def image(self, scene: int, camera: int) -> np.ndarray:
        """(H, W, 3) uint8"""
        part = int(np.searchsorted(self._first, scene, side="right")) - 1
        return np.asarray(self._images[part][scene - self._first[part], camera])

    def names(self) -> list[str]:
        """Everything that is named somewhere, sorted."""
        return sorted({thing.name for things in self.things for thing in things})


def _thing(item: dict) -> Thing:
    return Thing(item["name"], item["kind"], tuple(None if place is None else tuple(place) for place in item["places"]))
