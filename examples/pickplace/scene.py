"""What a pick-and-place scene holds, read from one YAML file per scene.

Lengths are metres, angles radians, speeds m/s; world axes are x away from the robot, y to its left, z up.
"""

from __future__ import annotations

import dataclasses
import re
import string
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_utils.yaml_file import Wrong, build, read_yaml

SCENES_DIR = Path(__file__).parent / "scenes"

Vector2 = tuple[float, float]
Vector3 = tuple[float, float, float]


@dataclass(frozen=True)
class ArenaSpec:
    source_bin: Vector3
    """Centre of the bin that objects start in."""
    target_bin: Vector3


@dataclass(frozen=True)
class BackgroundSpec:
    """Texture files of robosuite's textures folder, and the light."""

    floor: str
    walls: str
    source_bin: str
    target_bin: str
    light: Vector3 = (1.0, 1.0, 1.0)
    """Red, green and blue of the lamp, as shares of robosuite's own."""


@dataclass(frozen=True)
class RobotSpec:
    stiffness: float
    """Proportional gain of the OSC_POSE controller."""
    ee_start: Vector3
    ee_start_jitter: Vector3
    """Half widths of the box that start positions are drawn from."""
    ee_start_yaw_jitter: float


@dataclass(frozen=True)
class CameraSpec:
    position: Vector3
    look_at: Vector3
    fovy: float
    """Vertical field of view in degrees."""
    body: str | None = None
    """MuJoCo body the camera is fixed to, whose frame the vectors are in; None: the world."""


@dataclass(frozen=True)
class GraspSpec:
    below_top: float
    """Height of the object's top over the grip site in the grasp."""
    closing_yaw: float
    """Direction in which the fingers close, about z in the object's frame."""
    symmetry: float
    """The grasp is as good after a turn by this angle about z; 0: by any angle."""


@dataclass(frozen=True)
class ShapeSpec:
    """A plain solid."""

    kind: str
    """``box`` or ``cylinder`` (upright)."""
    size: tuple[float, ...]
    """Half lengths (x, y, z) of a box; radius and half height of a cylinder."""
    density: float = 200.0
    """kg/m3"""
    friction: Vector3 = (1.5, 0.01, 0.001)
    """Sliding, torsional and rolling, as MuJoCo has them."""

    def __post_init__(self) -> None:
        lengths = {"box": 3, "cylinder": 2}
        if self.kind not in lengths:
            raise ValueError(f"kind: {self.kind!r} is no shape; choose from {', '.join(lengths)}")
        if len(self.size) != lengths[self.kind] or min(self.size) <= 0:
            raise ValueError(f"size: {list(self.size)}; a {self.kind} has {lengths[self.kind]} positive half lengths")


@dataclass(frozen=True)
class ObjectSpec:
    nouns: tuple[str, ...]
    grasp: GraspSpec
    model: str | None = None
    """Class name in ``robosuite.models.objects``; None: the ``shape``."""
    shape: ShapeSpec | None = None

    def __post_init__(self) -> None:
        if (self.model is None) == (self.shape is None):
            raise ValueError("give model (a class of robosuite.models.objects) or shape, and not both")


@dataclass(frozen=True)
class PlacementSpec:
    x: Vector2
    y: Vector2
    yaw: Vector2
    min_distance: float
    """Between the centres of any two objects."""


@dataclass(frozen=True)
class ContainerSpec:
    nouns: tuple[str, ...]
    x: Vector2
    y: Vector2
    floor: float
    rim: float
    drop: Vector2
    """Where the expert lets go."""
    color: Vector3 | None = None
    """Red, green and blue in [0, 1] of a mat that covers the container's floor; None: no mat."""

    def contains(self, xy: np.ndarray) -> bool:
        """Whether ``xy`` (2,) in the world lies within the container's outline."""
        return self.x[0] < xy[0] < self.x[1] and self.y[0] < xy[1] < self.y[1]


@dataclass(frozen=True)
class Task:
    object: str
    container: str


@dataclass(frozen=True)
class SuccessSpec:
    max_height: float
    """Of the object's centre above the container's floor."""
    min_gripper_distance: float
    """From the grip site to the object's bounding box."""
    max_speed: float
    """Of the object."""


@dataclass(frozen=True)
class SettingSpec:
    """A test beyond the scene's own tasks: what may be new in it, in words or in looks."""

    tasks: tuple[Task, ...]
    background: BackgroundSpec | None = None
    """None: the scene's own."""


@dataclass(frozen=True)
class Scene:
    """One scene file. Raises ``ValueError`` from the constructor where fields contradict each other."""

    name: str
    arena: ArenaSpec
    background: BackgroundSpec
    robot: RobotSpec
    cameras: dict[str, CameraSpec]
    """In the order they are recorded; the first is the main camera."""
    objects: dict[str, ObjectSpec]
    placement: PlacementSpec
    containers: dict[str, ContainerSpec]
    tasks: tuple[Task, ...]
    instructions: tuple[str, ...]
    """Templates with ``{object}`` and ``{container}``."""
    success: SuccessSpec
    settings: dict[str, SettingSpec] = dataclasses.field(default_factory=dict)
    """Tests by name, which evaluation may choose; demonstrations are of ``tasks`` alone."""

    def __post_init__(self) -> None:
        for name in ("cameras", "objects", "containers", "tasks", "instructions"):
            if not getattr(self, name):
                raise ValueError(f"{name}: is empty; give at least one entry")
        for kind in ("objects", "containers"):
            for name, spec in getattr(self, kind).items():
                if not spec.nouns:
                    raise ValueError(f"{kind}.{name}.nouns: is empty; give at least one noun for the instructions")
        self._check_tasks("tasks", self.tasks)
        for name, setting in self.settings.items():
            if not setting.tasks:
                raise ValueError(f"settings.{name}.tasks: is empty; give at least one entry")
            self._check_tasks(f"settings.{name}.tasks", setting.tasks)
        for i, template in enumerate(self.instructions):
            fields = {field for _, field, _, _ in string.Formatter().parse(template) if field is not None}
            if "object" not in fields or not fields <= {"object", "container"}:
                raise ValueError(
                    f"instructions[{i}]: {template!r} has the fields {sorted(fields)}; "
                    "it must have {object} and may have {container}"
                )
        ranges = {f"placement.{axis}": getattr(self.placement, axis) for axis in ("x", "y", "yaw")}
        for name, container in self.containers.items():
            ranges |= {f"containers.{name}.x": container.x, f"containers.{name}.y": container.y}
            if not container.contains(np.array(container.drop)):
                raise ValueError(f"containers.{name}.drop: {container.drop} lies outside the container's own x and y")
        for where, (low, high) in ranges.items():
            if low > high:
                raise ValueError(f"{where}: [{low}, {high}] is empty; write the lower bound first")
        for name, camera in self.cameras.items():
            if not 0 < camera.fovy < 180:
                raise ValueError(f"cameras.{name}.fovy: {camera.fovy} is not between 0 and 180 degrees")
            direction = np.subtract(camera.look_at, camera.position)
            if np.linalg.norm(direction) < 1e-6:
                raise ValueError(f"cameras.{name}.look_at: equals its position; it must be a point in front of it")
        if self.robot.stiffness <= 0:
            raise ValueError(f"robot.stiffness: {self.robot.stiffness} is not positive")

    def _check_tasks(self, where: str, tasks: tuple[Task, ...]) -> None:
        for i, task in enumerate(tasks):
            if task.object not in self.objects:
                raise ValueError(f"{where}[{i}].object: {task.object!r} is not among objects {sorted(self.objects)}")
            if task.container not in self.containers:
                raise ValueError(
                    f"{where}[{i}].container: {task.container!r} is not among containers {sorted(self.containers)}"
                )

    def in_setting(self, name: str) -> Scene:
        """The scene with the tasks and the background of one of its ``settings``. Raises ``ValueError``."""
        if name not in self.settings:
            known = ", ".join(self.settings) or "none"
            raise ValueError(f"scene {self.name} has no setting {name!r}; it has {known}")
        setting = self.settings[name]
        return dataclasses.replace(self, tasks=setting.tasks, background=setting.background or self.background)

    def prompts(self, task: Task) -> list[str]:
        """Every paraphrase of a task's instruction, the plainest first."""
        return [
            template.format(object=noun, container=place)
            for template in self.instructions
            for noun in self.objects[task.object].nouns
            for place in self.containers[task.container].nouns
        ]


def load_scene(name_or_path: str | Path) -> Scene:
    """Reads a scene file: a name in the ``scenes`` folder beside this module, or a path to a YAML file.

    Raises ``FileNotFoundError`` for a missing file and ``ValueError`` that names the file and key for a wrong one.
    """
    path = Path(name_or_path)
    if path.suffix not in (".yaml", ".yml"):
        path = SCENES_DIR / f"{name_or_path}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in SCENES_DIR.glob("*.yaml")))
        raise FileNotFoundError(f"no scene file {path}; scenes here: {known}; or give a path ending in .yaml")
    return read_spec(Scene, path)


def read_spec(kind: type, path: Path):
    """An instance of the dataclass ``kind`` from a YAML file; a file may be ``like`` another one beside it, whose keys
    hold where it has none of its own. Raises ``ValueError`` that names the file, line and key."""
    own = read_yaml(path)
    files, values = [own], own.value
    if isinstance(values, dict) and "like" in values:
        other = path.parent / str(values["like"])
        if not other.is_file():
            raise ValueError(f"{own.at('like')}: like: there is no {other}")
        files.append(read_yaml(other))
        if not isinstance(files[1].value, dict):
            raise ValueError(f"{other}: is no mapping from keys, which {own.at('like')} takes them from")
        values = {**files[1].value, **{key: value for key, value in values.items() if key != "like"}}
    try:
        return build(kind, values)
    except Wrong as error:
        top = re.split(r"[.\[]", error.place)[0]
        file = next((file for file in files if isinstance(file.value, dict) and top in file.value), own)
        raise ValueError(f"{file.at(error.place)}: {error}") from error
