"""A task of one of the benchmarks as the policy meets it: states in, actions in, poses and images out.

Import it through ``environment.import_simulator``: robosuite decides on its OpenGL when it is imported.
"""

from __future__ import annotations

import atexit
import sys
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from xml.etree import ElementTree

import mujoco
import numpy as np
import PIL.Image
from robosuite.utils import camera_utils
from robosuite.utils.errors import RandomizationError

from data_utils.words import one_line
from examples.errors import SceneError, SimulatorError
from examples.libero.bddl import Predicate, UnusableTask
from examples.libero.environment import assets_hint, import_scenes
from examples.libero.tasks import LiberoTask

FINGER_TRAVEL = 0.04  # m, of each of the Panda's fingers
CAMERAS = {"agentview": "agentview", "eye_in_hand": "robot0_eye_in_hand"}  # our name -> the simulator's
_PLACEMENTS_TRIED = 100
_NOISES = ("motion_blur", "gaussian_blur", "zoom_blur", "fog", "glass_blur")  # by LIBERO-plus's numbers
_GRID = 7  # points along an edge of a collision shape's box
_HIDDEN_GROUP = 5  # which robosuite does not draw
WELL_INSIDE = 0.4  # of the range of a joint in which its predicate holds


@dataclass(frozen=True)
class Joint:
    """A drawer's, a door's or a knob's, and what moves with it."""

    axis: np.ndarray
    """(3,) in the world."""
    anchor: np.ndarray
    """(3,) in the world, a point of the axis."""
    missing: float
    """m or rad along or about the axis until what is wanted holds, with something to spare."""
    points: np.ndarray
    """(N, 3) in the world, on the collision shapes of what moves."""


class LiberoEnv:
    """Panda under OSC_POSE in one task's scene, 20 control steps per second.

    The end-effector frame is the one the controller moves: the grip site between the finger pads, z towards the object
    and x along the closing direction. robosuite's ``robot0_eef_quat`` is that of the hand's body instead, turned by 90
    degrees about z. Images are rendered only when asked for.

    Args:
        task: the task.
        image_size: height and width of images; None: nothing will be rendered, and no OpenGL is started.
    Raises:
        SceneError: a mesh or texture is missing.
        SimulatorError: OpenGL does not start.
    """

    cameras = tuple(CAMERAS)

    def __init__(self, task: LiberoTask, image_size: int | None = 256) -> None:
        self.task = task
        self.image_size = image_size
        self.time = 0
        self._images: dict[str, np.ndarray] = {}  # of the present moment
        scenes, goals = import_scenes(task.benchmark)
        _check_goal_file(task, goals)
        try:
            self._scene = scenes.ControlEnv(
                bddl_file_name=str(task.scene_file),
                use_camera_obs=False,
                has_offscreen_renderer=image_size is not None,
                hard_reset=False,  # building the model again takes seconds and changes nothing
                ignore_done=True,
            )
            self._env = self._scene.env
        except (FileNotFoundError, ValueError, KeyError) as error:
            what = one_line(error)
            raise SceneError(
                f"{task.name}: the scene does not load ({what}); if assets are missing, {assets_hint(task.benchmark)}"
            ) from error
        except (ImportError, RuntimeError, AttributeError, mujoco.FatalError) as error:
            raise SimulatorError(f"OpenGL does not start here ({error}); see MUJOCO_GL") from error
        # At the interpreter's exit too, and before robosuite, which registered itself by now, ends OpenGL.
        self.close = weakref.finalize(self, _close, self._env)
        atexit.register(self.close)
        self._env._observables = OrderedDict()  # poses are read when asked for, not 25 times per control step
        self._fixture_bodies = {
            name: body
            for name, fixture in self._env.fixtures_dict.items()
            if (body := fixture.root_body) in self._sim.model.body_names
        }

    # -- what happens -------------------------------------------------------------------------------------------------

    def reset(self, seed: int = 0) -> None:
        """A new placement of everything, drawn from ``seed``; the arm at home."""
        np.random.seed(seed)  # LIBERO's samplers draw from numpy's global generator
        for _ in range(_PLACEMENTS_TRIED):
            try:
                self._env.reset()
                break
            except RandomizationError:
                continue
        else:
            raise SimulatorError(f"{self.task.name}: no placement without collisions in {_PLACEMENTS_TRIED} tries")
        self._images.clear()
        self.time = 0

    def set_state(self, state: np.ndarray) -> None:
        """Go on from a MuJoCo state (D,), as LIBERO stores them: time, positions, velocities.

        The controller's goal and the gripper's command, which no state holds, become those that keep it where it is;
        with that, a recorded episode replays to within rounding. Raises ``ValueError`` for another size.
        """
        size = 1 + self._sim.model.nq + self._sim.model.nv
        if np.shape(state) != (size,):
            raise ValueError(f"{self.task.name}: state of shape {np.shape(state)}; this scene's have {size} numbers")
        self._sim.set_state_from_flattened(np.asarray(state, np.float64))
        self._sim.forward()
        self._images.clear()
        self._env._post_process()
        robot = self._env.robots[0]
        robot.controller.update(force=True)
        robot.controller.reset_goal()
        command = 2.0 * self.openness - 1.0
        robot.gripper.current_action = np.array([command, -command])
        self.time = 0

    def set_thing(self, thing: str, position: np.ndarray, turn: float = 0.0) -> None:
        """Put a movable object's frame at ``position`` (3,) in the world, turned from where it is about the vertical by
        ``turn`` (rad), whatever is there already."""
        start, end = self._sim.model.get_joint_qpos_addr(self._env.objects_dict[thing].joints[0])
        pose = self._sim.data.qpos[start:end]  # position, quaternion with w first
        turned = np.zeros(4)
        mujoco.mju_mulQuat(turned, np.array([np.cos(turn / 2), 0.0, 0.0, np.sin(turn / 2)]), pose[3:].copy())
        pose[:3], pose[3:] = position, turned
        self._sim.forward()
        self._images.clear()

    def set_arm(self, joints: np.ndarray, openness: float) -> None:
        """Put the arm's ``joints`` (7,) rad and the gripper somewhere, whatever is there already."""
        robot = self._env.robots[0]
        self._sim.data.qpos[robot._ref_joint_pos_indexes] = joints
        self._sim.data.qpos[robot._ref_gripper_joint_pos_indexes] = FINGER_TRAVEL * openness * np.array([1.0, -1.0])
        self._sim.forward()
        self._images.clear()

    def set_fixtures(self, poses: Mapping[str, np.ndarray]) -> None:
        """Move fixtures, which states do not hold: name -> (7,) position and quaternion (w first)."""
        for name, pose in poses.items():
            body = self._sim.model.body_name2id(self._fixture_bodies[name])
            self._sim.model.body_pos[body] = pose[:3]
            self._sim.model.body_quat[body] = pose[3:]
        self._sim.forward()
        self._images.clear()

    def step(self, action: np.ndarray) -> None:
        """Executes one OSC_POSE ``action`` (7,) in [-1, 1] for one control step (0.05 s)."""
        self._env.step(np.asarray(action, np.float64))
        self._images.clear()
        # A physics step ends by moving the joints; poses of sites and cameras would stay those before it, and so differ
        # from those that the controller starts the next action from.
        model, data = self._sim.model._model, self._sim.data._data
        mujoco.mj_kinematics(model, data)
        mujoco.mj_camlight(model, data)
        self.time += 1

    # -- what is the case ---------------------------------------------------------------------------------------------

    def success(self) -> bool:
        """Whether the task's goal holds now."""
        return bool(self._env._check_success())

    def holds(self, goal: Iterable[Predicate]) -> bool:
        """Whether ``goal``, of this task or of another one in the same scene, holds now.

        Raises ``ValueError`` where it is about things that are not in this scene.
        """
        goal = tuple(goal)
        if not self.task.problem.names(goal):
            raise ValueError(f"{self.task.name}: its scene lacks some of what {goal} is about")
        return all(self._env._eval_predicate(list(predicate)) for predicate in goal)

    @property
    def state(self) -> np.ndarray:
        """(D,) as :meth:`set_state` takes it."""
        return self._sim.get_state().flatten()

    @property
    def fixtures(self) -> dict[str, np.ndarray]:
        """As :meth:`set_fixtures` takes them."""
        model = self._sim.model
        ids = {name: model.body_name2id(body) for name, body in self._fixture_bodies.items()}
        return {name: np.concatenate([model.body_pos[i], model.body_quat[i]]) for name, i in ids.items()}

    def fixtures_of(self, model_xml: str) -> dict[str, np.ndarray]:
        """Fixtures of this scene as a saved model has them; those that it lacks are left out."""
        bodies = {body.get("name"): body for body in ElementTree.fromstring(model_xml).iter("body")}
        poses = {}
        for name, body in self._fixture_bodies.items():
            if body in bodies:
                parts = bodies[body].get("pos", "0 0 0"), bodies[body].get("quat", "1 0 0 0")
                poses[name] = np.array(" ".join(parts).split(), np.float64)
        return poses

    @property
    def world_from_ee(self) -> np.ndarray:
        """Pose (4, 4) of the grip site."""
        site = self._env.robots[0].eef_site_id
        pose = np.eye(4)
        pose[:3, :3] = self._sim.data.site_xmat[site].reshape(3, 3)
        pose[:3, 3] = self._sim.data.site_xpos[site]
        return pose

    @property
    def home(self) -> np.ndarray:
        """The arm's joints (7,) rad where episodes begin, before what differs between them."""
        return np.array(self._env.robots[0].init_qpos)

    @property
    def held_orientation(self) -> np.ndarray:
        """(3, 3) of the grip site, where the controller will keep it until an action turns it."""
        return np.array(self._env.robots[0].controller.goal_ori)

    @property
    def openness(self) -> float:
        """Of the gripper, 0 closed to 1 open."""
        finger = self._sim.data.qpos[self._env.robots[0]._ref_gripper_joint_pos_indexes[0]]
        return float(np.clip(finger / FINGER_TRAVEL, 0.0, 1.0))

    # -- privileged: what a script may ask, and a policy may not ----------------------------------------------------

    def collision_points(self, thing: str) -> np.ndarray:
        """Points (N, 3) in the world on an object's or a fixture's collision shapes: a mesh's vertices, a grid on
        everything else's box."""
        return self._points_below(self._body(thing))

    def joint(self, part: str, change: str) -> Joint:
        """What opens a drawer (``part``: the region inside it) or a door, or turns a knob (``part``: the fixture).

        ``change`` is the predicate that should come to hold: open, close, turnon or turnoff. Raises ``ValueError``
        where nothing of ``part`` moves.
        """
        owner = self._env.get_object(self.task.problem.regions.get(part, part))
        names = self._env.object_sites_dict[part].joints if part in self._env.object_sites_dict else owner.joints
        if not names:
            raise ValueError(f"{self.task.name}: nothing of {part} moves")
        model, data = self._sim.model._model, self._sim.data._data
        number = self._sim.model.joint_name2id(names[0])
        near, far = sorted(owner.object_properties["articulation"][f"default_{change}_ranges"], key=abs)
        return Joint(
            axis=data.xaxis[number].copy(),
            anchor=data.xanchor[number].copy(),
            missing=near + WELL_INSIDE * (far - near) - float(data.qpos[model.jnt_qposadr[number]]),
            points=self._points_below(int(model.jnt_bodyid[number])),
        )

    def _points_below(self, root: int) -> np.ndarray:
        model, data = self._sim.model._model, self._sim.data._data
        inside = {root}
        for body in range(model.nbody):  # parents come before their children
            if model.body_parentid[body] in inside:
                inside.add(body)
        clouds = [np.zeros((0, 3))]
        for geom in np.flatnonzero((model.geom_contype != 0) | (model.geom_conaffinity != 0)):
            if model.geom_bodyid[geom] in inside:
                points = _shape_points(model, geom)
                clouds.append(points @ data.geom_xmat[geom].reshape(3, 3).T + data.geom_xpos[geom])
        return np.concatenate(clouds)

    def position(self, thing: str) -> np.ndarray:
        """Of an object's or a fixture's frame (3,) in the world."""
        return self._sim.data.body_xpos[self._body(thing)].copy()

    def _body(self, thing: str) -> int:
        owner = {**self._env.objects_dict, **self._env.fixtures_dict}[thing]
        return self._sim.model.body_name2id(owner.root_body)

    def region_position(self, region: str) -> np.ndarray:
        """Centre (3,) in the world of a place that the goal file names."""
        return self._sim.data.get_site_xpos(region).copy()

    def region_extent(self, region: str) -> np.ndarray:
        """Half extents (3,) along the world's axes of the box around such a place."""
        size = self._sim.model.site_size[self._sim.model.site_name2id(region)]
        return np.abs(self._sim.data.get_site_xmat(region)) @ size

    # -- cameras, by name ----------------------------------------------------------------------------------------------

    def rgb(self, camera: str) -> np.ndarray:
        """Image (H, W, 3) uint8, first row on top, read-only: rendered once until something is moved."""
        if camera not in self._images:
            self._use_own_context()
            image = self._sim.render(camera_name=CAMERAS[camera], height=self.image_size, width=self.image_size)
            image = np.ascontiguousarray(self._corrupted(camera, image)[::-1])  # OpenGL's first row is the bottom one
            image.setflags(write=False)
            self._images[camera] = image
        return self._images[camera]

    def intrinsics(self, camera: str) -> np.ndarray:
        """K (3, 3) in pixels of the image."""
        return camera_utils.get_camera_intrinsic_matrix(self._sim, CAMERAS[camera], self.image_size, self.image_size)

    def world_from_cam(self, camera: str) -> np.ndarray:
        """Pose (4, 4) of the camera in OpenCV axes."""
        return camera_utils.get_camera_extrinsic_matrix(self._sim, CAMERAS[camera])

    def gripper_mask(self, camera: str) -> np.ndarray:
        """Pixels (H, W) bool that the gripper covers, whatever stands before it."""
        self._use_own_context()
        model = self._sim.model
        bodies = [model.body_id2name(body) or "" for body in range(model.nbody)]
        others = [not bodies[body].startswith("gripper0_") for body in model.geom_bodyid]
        groups = model.geom_group[others].copy()
        model.geom_group[others] = _HIDDEN_GROUP
        # As robosuite's own segmentation, whose sums of bytes overflow under numpy 2: colours are 1 + a shape's number.
        context, size = self._sim._render_context_offscreen, self.image_size
        context.render(size, size, model.camera_name2id(CAMERAS[camera]), segmentation=True)
        number = context.read_pixels(size, size).astype(np.int64) @ (1, 1 << 8, 1 << 16)
        model.geom_group[others] = groups
        shapes = [shape for shape in context.scn.geoms[: context.scn.ngeom] if shape.segid != -1]
        seen = [shape.segid + 1 for shape in shapes if shape.objtype == mujoco.mjtObj.mjOBJ_GEOM]
        return np.isin(number, seen)[::-1]

    def _corrupted(self, camera: str, image: np.ndarray) -> np.ndarray:
        """With the noise that a LIBERO-plus task asks for, of the fixed camera alone, as its package draws it."""
        number = getattr(self._scene, "noise", 0)  # 1 to 50: five kinds of ten severities
        if number == 0 or camera != "agentview":
            return image
        package = sys.modules[type(self._scene).__module__]
        corrupt = getattr(package, _NOISES[(number - 1) // 10])
        drawn = np.random.get_state()  # the package draws from numpy's global generator
        np.random.seed([number, self.time])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            noisy = corrupt(PIL.Image.fromarray(image), severity=(number - 1) % 10 + 1)
        np.random.set_state(drawn)
        return np.asarray(noisy).astype(np.uint8)

    def _use_own_context(self) -> None:
        # robosuite draws into whichever context is current: that of the environment made last.
        if self.image_size is None:
            raise ValueError("this environment was made without image_size; it renders nothing")
        self._sim._render_context_offscreen.gl_ctx.make_current()

    def __enter__(self) -> "LiberoEnv":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    @property
    def _sim(self):
        return self._env.sim


def _shape_points(model, geom: int) -> np.ndarray:
    """Points (N, 3) of a collision shape in its own frame."""
    size, kind = model.geom_size[geom], model.geom_type[geom]
    if kind == mujoco.mjtGeom.mjGEOM_MESH:
        mesh = model.geom_dataid[geom]
        first = model.mesh_vertadr[mesh]
        return model.mesh_vert[first : first + model.mesh_vertnum[mesh]].astype(np.float64)
    half = {
        mujoco.mjtGeom.mjGEOM_SPHERE: size[[0, 0, 0]],
        mujoco.mjtGeom.mjGEOM_CAPSULE: np.array([size[0], size[0], size[0] + size[1]]),
        mujoco.mjtGeom.mjGEOM_CYLINDER: size[[0, 0, 1]],
    }.get(mujoco.mjtGeom(kind), size)
    grid = np.stack(np.meshgrid(*[np.linspace(-1.0, 1.0, _GRID)] * 3), axis=-1).reshape(-1, 3)
    return grid[np.abs(grid).max(axis=1) == 1.0] * half


def _check_goal_file(task: LiberoTask, goals) -> None:
    """The packages of LIBERO-PRO and LIBERO-plus build another task's scene where a goal file does not parse."""
    parse = getattr(goals, "_core_robosuite_parse_problem", goals.robosuite_parse_problem)
    try:
        parse(str(task.bddl_file))
    except Exception as error:  # whatever its parser stumbles over
        raise UnusableTask(f"{task.bddl_file}: was shipped as a goal file that does not parse ({error})") from error


def _close(env) -> None:
    context = env.sim._render_context_offscreen
    if context is not None:
        context.gl_ctx.make_current()  # what is freed is looked up in the current context
    del context
    env.close()
