"""What the world of blocks holds, read from one YAML file, and what an episode draws of it.

Nothing here needs the simulator: an episode's blocks, trays and instruction follow from its seed.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from examples.pickplace.scene import (
    ArenaSpec,
    BackgroundSpec,
    CameraSpec,
    ContainerSpec,
    GraspSpec,
    ObjectSpec,
    PlacementSpec,
    RobotSpec,
    Scene,
    ShapeSpec,
    SuccessSpec,
    Task,
    Vector3,
    read_spec,
)

WORLD_FILE = Path(__file__).parent / "blocks.yaml"
GOAL = "goal"  # the container of a world that has one
MAX_DRAWS = 10_000


@dataclass(frozen=True)
class BlockSpec:
    shape: ShapeSpec
    grasp: GraspSpec


@dataclass(frozen=True)
class VariationSpec:
    camera: float
    """Metres to each side, of a fixed camera's position and of the point it looks at."""
    light: float
    """Share by which the light is brighter or darker."""
    tint: float
    """Share by which each of the three numbers of a colour is off."""


@dataclass(frozen=True)
class UnseenSpec:
    background: BackgroundSpec
    camera: CameraSpec
    """In place of the first camera."""


@dataclass(frozen=True)
class SplitSpec:
    """What is unseen."""

    object: bool = False
    container: bool = False
    environment: bool = False
    instruction: bool = False


@dataclass(frozen=True)
class Block:
    color: str
    shape: str

    def __str__(self) -> str:
        return f"{self.color} {self.shape}"


@dataclass(frozen=True)
class Request:
    """What an instruction names."""

    block: Block
    tray: str
    """The tray's colour."""


@dataclass(frozen=True)
class Layout:
    """An episode's things, without their places."""

    blocks: tuple[Block, ...]
    """The named one first."""
    trays: dict[str, str]
    """Compartment -> colour."""
    target: str
    """The compartment that is named, or the world's goal."""
    instructions: tuple[str, ...]
    """Paraphrases of the instruction, one of which is given."""


@dataclass(frozen=True)
class World:
    """The world file. Raises ``ValueError`` from the constructor where fields contradict each other."""

    name: str
    arena: ArenaSpec
    robot: RobotSpec
    colors: dict[str, Vector3]
    shapes: dict[str, BlockSpec]
    seen: dict[str, tuple[str, ...]]
    """Shape -> colours in which demonstrations have it; the other pairs are unseen."""
    trays: dict[str, ContainerSpec]
    seen_trays: tuple[str, ...]
    blocks: tuple[int, int]
    """Least and most in an episode."""
    confusable: float
    """Share of the episodes in which other blocks have the named one's colour and its shape."""
    same_shape: int
    placement: PlacementSpec
    cameras: dict[str, CameraSpec]
    background: BackgroundSpec
    variation: VariationSpec
    unseen: UnseenSpec
    instructions: tuple[str, ...]
    unseen_instructions: tuple[str, ...]
    splits: dict[str, SplitSpec]
    success: SuccessSpec
    goal: ContainerSpec | None = None
    """Where every instruction wants the block, in place of a tray."""

    def __post_init__(self) -> None:
        for shape, colors in self.seen.items():
            if shape not in self.shapes:
                raise ValueError(f"seen.{shape}: is not among shapes {', '.join(self.shapes)}")
            self._check_colors(f"seen.{shape}", colors)
        self._check_colors("seen_trays", self.seen_trays)
        if not 1 <= self.blocks[0] <= self.blocks[1] <= self.same_shape * len(self.shapes):
            raise ValueError(
                f"blocks: {list(self.blocks)}; wanted the least and the most, at most {self.same_shape} per shape"
            )
        if len(self.trays) < 2 or len(self.seen_trays) < 2:
            raise ValueError("trays, seen_trays: give two at least; with one, no instruction has to name it")

    def _check_colors(self, where: str, colors: tuple[str, ...]) -> None:
        unknown = [color for color in colors if color not in self.colors]
        if unknown:
            raise ValueError(f"{where}: {', '.join(unknown)} is not among colors {', '.join(self.colors)}")

    def with_confusable(self, share: float | None) -> World:
        """The world where such a share of the episodes have blocks that are alike; None: as it is.

        Raises ``ValueError`` where it is no share.
        """
        if share is None:
            return self
        if not 0 <= share <= 1:
            raise ValueError(f"confusable is {share}; it is a share of the episodes, between 0 and 1")
        return dataclasses.replace(self, confusable=share)

    @property
    def seen_blocks(self) -> tuple[Block, ...]:
        return tuple(Block(color, shape) for shape, colors in self.seen.items() for color in colors)

    @property
    def unseen_blocks(self) -> tuple[Block, ...]:
        """Pairs that no demonstration shows, though it shows the colour and the shape."""
        pairs = (Block(color, shape) for shape in self.shapes for color in self.colors)
        return tuple(block for block in pairs if block not in self.seen_blocks)

    @property
    def unseen_trays(self) -> tuple[str, ...]:
        return tuple(color for color in self.colors if color not in self.seen_trays)

    def split(self, name: str) -> SplitSpec:
        """Raises ``ValueError`` for an unknown name."""
        if name not in self.splits:
            raise ValueError(f"world {self.name} has no split {name!r}; it has {', '.join(self.splits)}")
        return self.splits[name]

    def slots(self) -> dict[str, str]:
        """Bodies of the simulation -> their shapes: as many of each as may be in an episode."""
        return {f"{shape}_{number}": shape for shape in self.shapes for number in range(self.same_shape)}

    def scene(self, unseen_environment: bool) -> Scene:
        """The simulator's scene: a body per slot, whose colours every episode sets."""
        cameras = dict(self.cameras)
        if unseen_environment:
            cameras[next(iter(cameras))] = self.unseen.camera
        objects = {
            slot: ObjectSpec(nouns=(shape,), grasp=self.shapes[shape].grasp, shape=self.shapes[shape].shape)
            for slot, shape in self.slots().items()
        }
        grey = (0.5, 0.5, 0.5)
        return Scene(
            name=self.name,
            arena=self.arena,
            background=self.unseen.background if unseen_environment else self.background,
            robot=self.robot,
            cameras=cameras,
            objects=objects,
            placement=self.placement,
            containers={name: dataclasses.replace(tray, color=grey) for name, tray in self.trays.items()}
            | ({} if self.goal is None else {GOAL: self.goal}),
            tasks=(Task(next(iter(objects)), next(iter(self.trays))),),
            instructions=self.instructions,
            success=self.success,
        )

    def request(self, instruction: str) -> Request:
        """Which block and which tray an instruction names, whatever its wording.

        Raises:
            ValueError: it does not name one of each.
        """
        words = re.findall(r"[a-z]+", instruction.lower())
        pairs = [(color, noun) for color, noun in zip(words, words[1:], strict=False) if color in self.colors]
        blocks = [Block(color, noun) for color, noun in pairs if noun in self.shapes]
        trays = [color for color, noun in pairs if noun == "tray"]
        if len(blocks) != 1 or len(trays) != 1:
            raise ValueError(
                f'"{instruction}" does not name one block and one tray; wanted for example '
                f'"{self.instructions[0].format(object=self.seen_blocks[0], container=self.seen_trays[0] + " tray")}", '
                f"of colours {', '.join(self.colors)} and shapes {', '.join(self.shapes)}"
            )
        return Request(blocks[0], trays[0])

    def draw(self, rng: np.random.Generator, split: SplitSpec, request: Request | None = None) -> Layout:
        """Blocks, trays and instruction of an episode; which block, which tray and which colours are drawn evenly.

        ``request`` says which block and tray are named.
        """
        if request is None:
            target = _choice(rng, self.unseen_blocks if split.object else self.seen_blocks)
        else:
            target = request.block
        others = self._draw_others(rng, target, self.seen_blocks)
        if request is None:
            named = _choice(rng, self.unseen_trays if split.container else self.seen_trays)
        else:
            named = request.tray
        rest = [color for color in self.seen_trays if color != named]
        compartments = list(self.trays)
        place = _choice(rng, compartments)
        trays = {place: named}
        for compartment in compartments:
            if compartment != place:
                trays[compartment] = rest.pop(int(rng.integers(len(rest))))
        templates = self.unseen_instructions if split.instruction else self.instructions
        texts = tuple(template.format(object=target, container=f"{named} tray") for template in templates)
        goal = place if self.goal is None else GOAL
        return Layout((target, *others), {name: trays[name] for name in compartments}, goal, texts)

    def draw_scenery(self, rng: np.random.Generator) -> Layout:
        """Blocks and trays of any colours, for pictures that a vision-language model learns from."""
        everything = self.seen_blocks + self.unseen_blocks
        target = _choice(rng, everything)
        others = self._draw_others(rng, target, everything)
        colors = rng.permutation(list(self.colors))[: len(self.trays)]
        trays = {name: str(color) for name, color in zip(self.trays, colors, strict=True)}
        return Layout((target, *others), trays, next(iter(trays)), ())

    def _draw_others(self, rng: np.random.Generator, target: Block, pool: tuple[Block, ...]) -> list[Block]:
        count = int(rng.integers(self.blocks[0], self.blocks[1] + 1)) - 1
        alike = rng.random() < self.confusable
        kins = [
            [block for block in pool if block != target and getattr(block, part) == getattr(target, part)]
            for part in ("color", "shape")
        ]
        kins = [kin for kin in kins if kin]  # of a colour that demonstrations have in one shape alone, there is none
        for _ in range(MAX_DRAWS):
            others = [pool[i] for i in rng.choice(len(pool), count, replace=False)]
            shapes = [block.shape for block in (target, *others)]
            fits = target not in others and max(map(shapes.count, shapes)) <= self.same_shape
            for kin in kins if alike and count > 1 else ():
                fits &= any(block in kin for block in others)
            if fits:
                return others
        raise ValueError(f"world {self.name}: {count + 1} blocks do not go with a {target}; see same_shape and seen")


def load_world(path: Path = WORLD_FILE) -> World:
    """Raises ``FileNotFoundError`` and, with file and key, ``ValueError``."""
    if not path.is_file():
        raise FileNotFoundError(f"no world file {path}")
    return read_spec(World, path)


def _choice(rng: np.random.Generator, items):
    return items[int(rng.integers(len(items)))]
