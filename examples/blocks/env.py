"""The world of blocks as the policy meets it: colours, places, light and camera drawn anew in every episode."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from examples.blocks.world import Layout, SplitSpec, World, load_world
from examples.pickplace.env import PickPlaceEnv
from examples.pickplace.scene import Task

_ASIDE = (3.0, 3.0)  # m in the world, where blocks wait that an episode does without


@dataclasses.dataclass(frozen=True)
class Thing:
    """Something that can be named."""

    name: str
    kind: str
    """``object`` or ``container``."""
    position: np.ndarray
    """(3,) in the world: a block's centre, the middle of a tray's floor."""


class BlocksEnv(PickPlaceEnv):
    """Panda, blocks and trays, at 20 control steps per second; see :class:`PickPlaceEnv`.

    Args:
        split: one of the world file's ``splits``.
        nearest: share of the episodes in which the named block is made to lie nearest to the trays, so that the
            scene alone tells which it is; None: none is.
    """

    def __init__(
        self,
        split: str = "SO",
        image_size: int = 128,
        world: World | None = None,
        paraphrases: int | None = None,
        nearest: float | None = None,
    ) -> None:
        self._nearest = nearest
        self.world = load_world() if world is None else world
        self.split: SplitSpec = self.world.split(split)
        super().__init__(self.world.scene(self.split.environment), image_size, paraphrases)
        self._blocks: dict[str, str] = {}  # slot -> "red cube", of this episode
        self._trays: dict[str, str] = {}  # compartment -> "blue tray"
        self._instructions: tuple[str, ...] = ()
        self._looks = _Looks(self)

    # -- an episode ------------------------------------------------------------------------------------------------

    def reset(self, seed: int | Sequence[int], task: Task | None = None) -> None:
        """Draws blocks, trays, instruction and initial state; the same seed gives the same episode.

        Raises ``ValueError`` where a task is given: here the seed says what is to be done.
        """
        if task is not None:
            raise ValueError("an episode of blocks has the task that its seed draws; give none")
        rng = np.random.default_rng(seed)
        self._begin(rng, self.world.draw(rng, self.split))
        prompts = self.prompts
        self.prompt = prompts[rng.integers(len(prompts))]

    def reset_for(self, seed: int | Sequence[int], instruction: str) -> None:
        """As :meth:`reset`, with the block and the tray that an instruction names among what is there.

        Raises ``ValueError`` where it does not name one of each.
        """
        rng = np.random.default_rng(seed)
        self._begin(rng, self.world.draw(rng, self.split, self.world.request(instruction)))
        self.prompt = instruction

    def instruct(self, instruction: str) -> None:
        """Another instruction for what is there now.

        Raises ``ValueError`` where it does not name a block and a tray that are there; the old one then stands.
        """
        request = self.world.request(instruction)
        names = {title: name for name, title in (self._blocks | self._trays).items()}
        wanted = [str(request.block), f"{request.tray} tray"]
        if missing := [title for title in wanted if title not in names]:
            raise ValueError(f"there is no {' and no '.join(missing)} here; there are {', '.join(names)}")
        self.task = Task(*(names[title] for title in wanted))
        self.prompt = instruction

    def push(self, name: str, velocity: Sequence[float]) -> None:
        """Give a block a sideways velocity (2,) in m/s, as a hand in passing would."""
        data = self.sim.sim.data
        joint = self.sim.objects[name].joints[0]
        speed = data.get_joint_qvel(joint).copy()
        speed[:2] = velocity
        data.set_joint_qvel(joint, speed)

    def _begin(self, rng: np.random.Generator, layout: Layout) -> None:
        target = self._set_up(rng, layout, self.draw_start_pose(rng))
        self.task = Task(target, layout.target)
        self._instructions = layout.instructions

    def reset_episode(self, seed: int | Sequence[int], index: int) -> None:
        self.reset(seed)

    def reset_scenery(self, rng: np.random.Generator, world_from_ee: np.ndarray) -> None:
        """Any blocks and trays, with the gripper at a pose (4, 4). Raises ``ValueError`` for one out of reach."""
        self._set_up(rng, self.world.draw_scenery(rng), world_from_ee)

    def _set_up(self, rng: np.random.Generator, layout: Layout, world_from_ee: np.ndarray) -> str:
        """Returns the slot of the layout's first block."""
        free = {
            shape: [slot for slot, own in self.world.slots().items() if own == shape] for shape in self.world.shapes
        }
        slots = [free[block.shape].pop(0) for block in layout.blocks]
        self._blocks = {slot: str(block) for slot, block in zip(slots, layout.blocks, strict=True)}
        self._trays = {name: f"{color} tray" for name, color in layout.trays.items()}
        colors = {slot: block.color for slot, block in zip(slots, layout.blocks, strict=True)} | layout.trays
        self._looks.draw(rng, colors)
        self._start_robot(world_from_ee)
        places = self._draw_placements(rng, len(slots))
        if self._nearest is not None and rng.random() < self._nearest:
            # The trays lie on the side of greater y. Places are swapped with their turns, whose distribution stays.
            first = int(np.argmax(places[:, 1]))
            places[[0, first]] = places[[first, 0]]
        for slot, (x, y, yaw) in zip(slots, places, strict=True):
            self._put(slot, x, y, self.scene.arena.source_bin[2] + 0.02, yaw)
        for number, slot in enumerate(slot for slot in self.scene.objects if slot not in self._blocks):
            self._put(slot, _ASIDE[0] + 0.3 * number, _ASIDE[1], 0.0, 0.0)
        self.sim.sim.forward()
        return slots[0]

    def hold(self, name: str) -> None:
        """Put a block between the fingers, as it is turned now."""
        joint = self.sim.objects[name].joints[0]
        place = self.sim.sim.data.get_joint_qpos(joint).copy()
        place[:3] = self.world_from_ee[:3, 3]
        self.sim.sim.data.set_joint_qpos(joint, place)
        self.sim.sim.forward()

    # -- what is there ---------------------------------------------------------------------------------------------

    @property
    def present(self) -> tuple[str, ...]:
        return tuple(self._blocks)

    def title(self, name: str) -> str:
        return self._blocks.get(name) or self._trays.get(name) or self.scene.containers[name].nouns[0]

    @property
    def prompts(self) -> list[str]:
        return list(self._instructions[: self.paraphrases])

    def things(self) -> list[Thing]:
        """Everything that can be named, and where it is."""
        blocks = [Thing(name, "object", self.world_from_object(slot)[:3, 3]) for slot, name in self._blocks.items()]
        trays = []
        for compartment, name in self._trays.items():
            spec = self.scene.containers[compartment]
            trays.append(Thing(name, "container", np.array([np.mean(spec.x), np.mean(spec.y), spec.floor])))
        return blocks + trays


class _Looks:
    """Colours, light and the fixed cameras' places, which an episode draws around those of the world file."""

    def __init__(self, env: BlocksEnv) -> None:
        self._env, self._world = env, env.world
        model = self._model = env.sim.mj_model
        self._geoms = {
            name: np.flatnonzero(model.geom_bodyid == model.body(env.sim.objects[name].root_body).id)
            for name in env.scene.objects
        } | {name: np.array([model.geom(f"{name}_mat").id]) for name in env.world.trays}
        for geoms in self._geoms.values():
            model.geom_matid[geoms] = -1  # a material's own colour would cover theirs
        self._light, self._materials = model.light_diffuse.copy(), model.mat_rgba.copy()

    def draw(self, rng: np.random.Generator, colors: dict[str, str]) -> None:
        """``colors``: of every block and tray that is there."""
        variation, model = self._world.variation, self._model
        for name, color in colors.items():
            tint = rng.uniform(1 - variation.tint, 1 + variation.tint, 3)
            model.geom_rgba[self._geoms[name]] = [*np.clip(self._world.colors[color] * tint, 0, 1), 1.0]
        model.mat_rgba[:] = self._materials
        model.mat_rgba[:, :3] *= rng.uniform(1 - variation.tint, 1, (model.nmat, 3))
        model.light_diffuse[:] = self._light * rng.uniform(1 - variation.light, 1 + variation.light)
        quaternion = self._env.simulator.camera_quaternion
        for name, spec in self._env.scene.cameras.items():
            if spec.body is None:
                off = rng.uniform(-variation.camera, variation.camera, (2, 3))
                moved = dataclasses.replace(
                    spec,
                    position=tuple(np.add(spec.position, off[0])),
                    look_at=tuple(np.add(spec.look_at, off[1])),
                )
                camera = model.camera(name)
                camera.pos[:], camera.quat[:] = moved.position, quaternion(moved)
