"""A pick-and-place scene as the policy meets it: observation frames in, actions out, success judged per task."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.spatial.transform import Rotation

from examples.headless import import_headless
from examples.pickplace.scene import Scene, Task, load_scene

FINGER_TRAVEL = 0.04  # m, of each of the Panda's fingers
_INSTALL = "pip install --no-deps robosuite==1.4.1 mujoco==3.3.2 && " + (
    "pip install numba termcolor glfw absl-py etils[epath] pyopengl"
)
_DOWN = np.array([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, -1.0]])  # gripper down, fingers close along world y


def gripper_down(closing_yaw: float) -> np.ndarray:
    """Rotation (3, 3) of a gripper that points down and closes along ``closing_yaw``, an angle from world x."""
    return Rotation.from_euler("z", closing_yaw - np.pi / 2).as_matrix() @ _DOWN


class PickPlaceEnv:
    """Panda, bins and objects of a scene, at 20 control steps per second.

    The end-effector frame is the controller's: the grip site between the finger pads, z towards the object. Images
    are rendered only when asked for. Raises ``ImportError`` with the install command where the simulator is missing.
    """

    def __init__(self, scene: Scene | str = "pickplace", image_size: int = 256, paraphrases: int | None = None) -> None:
        simulator = import_headless("examples.pickplace.simulator", _INSTALL)
        self.scene = load_scene(scene) if isinstance(scene, str) else scene
        self.image_size = image_size
        self.paraphrases = paraphrases  # prompts come from each task's first so many; None: from all
        self.sim = simulator.PickPlaceSim(self.scene)
        self._home = self.sim.robots[0].init_qpos.copy()
        self.simulator = simulator
        self._camera_renderer = None
        self._boxes = {name: self._bounding_box(name) for name in self.scene.objects}
        self.task: Task = self.scene.tasks[0]
        self.prompt = ""
        self.time = 0

    @property
    def renderer(self):
        """The cameras' renderer; OpenGL starts with its first use."""
        if self._camera_renderer is None:
            self._camera_renderer = self.simulator.CameraRenderer(self.sim, self.image_size, self.image_size)
        return self._camera_renderer

    def reset(self, seed: int | Sequence[int], task: Task | None = None) -> None:
        """Draws a new initial state; the same seed (a number or several) gives the same state, task and prompt."""
        rng = np.random.default_rng(seed)
        tasks = self.scene.tasks
        drawn = tasks[rng.integers(len(tasks))]
        self.task = drawn if task is None else task
        prompts = self.prompts
        self.prompt = prompts[rng.integers(len(prompts))]
        self._start_robot(self.draw_start_pose(rng))
        for name, (x, y, yaw) in zip(self.present, self._draw_placements(rng, len(self.present)), strict=True):
            self._put(name, x, y, self.scene.arena.source_bin[2] + 0.02, yaw)
        self.sim.sim.forward()

    def reset_episode(self, seed: int | Sequence[int], index: int) -> None:
        """As :meth:`reset`, for episode ``index`` of a recording or an evaluation: these take the tasks in turn."""
        self.reset(seed, self.scene.tasks[index % len(self.scene.tasks)])

    def step(self, action: np.ndarray) -> None:
        """Executes one OSC_POSE ``action`` (7,) in [-1, 1] for one control step (0.05 s)."""
        self.sim.step(action)
        self.time += 1

    @property
    def present(self) -> tuple[str, ...]:
        """Objects that take part in this episode."""
        return tuple(self.scene.objects)

    def title(self, name: str) -> str:
        """What people call an object or a container in this episode."""
        return name

    @property
    def prompts(self) -> list[str]:
        """The paraphrases in use of the present task's instruction."""
        return self.scene.prompts(self.task)[: self.paraphrases]

    @property
    def world_from_ee(self) -> np.ndarray:
        """Pose (4, 4) of the grip site."""
        site = self.sim.robots[0].eef_site_id
        pose = np.eye(4)
        pose[:3, :3] = self.sim.mj_data.site_xmat[site].reshape(3, 3)
        pose[:3, 3] = self.sim.mj_data.site_xpos[site]
        return pose

    @property
    def openness(self) -> float:
        """Mean opening of the two fingers, in [0 closed, 1 open]."""
        fingers = self.sim.mj_data.qpos[self.sim.robots[0]._ref_gripper_joint_pos_indexes]
        return float(np.clip(np.abs(fingers).mean() / FINGER_TRAVEL, 0.0, 1.0))

    def world_from_object(self, name: str) -> np.ndarray:
        """Pose (4, 4) of an object's body."""
        body = self.sim.mj_data.body(self.sim.objects[name].root_body)
        pose = np.eye(4)
        pose[:3, :3] = body.xmat.reshape(3, 3)
        pose[:3, 3] = body.xpos
        return pose

    def object_box(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Lower and upper corner (3,) of an object's bounding box in its own frame."""
        return self._boxes[name]

    def gripper_distance(self, name: str) -> float:
        """Metres from the grip site to an object's bounding box; 0 inside it."""
        world_from_object = self.world_from_object(name)
        point = world_from_object[:3, :3].T @ (self.world_from_ee[:3, 3] - world_from_object[:3, 3])
        low, high = self._boxes[name]
        return float(np.linalg.norm(point - np.clip(point, low, high)))

    def container_of(self, name: str) -> str | None:
        """The container that an object is in; None where it is in none."""
        position = self.world_from_object(name)[:3, 3]
        for place, container in self.scene.containers.items():
            if container.contains(position[:2]) and 0 < position[2] - container.floor < self.scene.success.max_height:
                return place
        return None

    def success(self) -> bool:
        """Whether the task's object lies in the task's container, released and at rest (the scene's rule)."""
        rule = self.scene.success
        joint = self.sim.mj_model.joint(self.sim.objects[self.task.object].joints[0])
        speed = np.linalg.norm(self.sim.mj_data.qvel[joint.dofadr[0] : joint.dofadr[0] + 3])
        return bool(
            self.container_of(self.task.object) == self.task.container
            and self.gripper_distance(self.task.object) > rule.min_gripper_distance
            and speed < rule.max_speed
        )

    def obs_frame(self) -> dict:
        """The newest observation frame as ``TrajPlanner.add_obs_frame`` takes it; times count control steps."""
        frame: dict = {
            "ee_pose": self.world_from_ee[None],  # (1, 4, 4)
            "gripper": np.array([self.openness]),  # (1,)
            "timestamp": float(self.time),
        }
        for camera in self.scene.cameras:
            K = self.renderer.intrinsics(camera)
            frame[camera] = {
                "model": "pinhole",
                "camera": {"width": self.image_size, "height": self.image_size, "K": K},
                "data": {"color": self.renderer.rgb(camera), "wcT": self.renderer.world_from_cam(camera), "seg": None},
            }
        return frame

    def close(self) -> None:
        if self._camera_renderer is not None:
            self._camera_renderer.close()
            self._camera_renderer = None
        self.sim.close()

    def __enter__(self) -> "PickPlaceEnv":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def _start_robot(self, world_from_ee: np.ndarray) -> None:
        """Reset the simulation with the gripper open at a pose (4, 4). Raises ``ValueError`` for one out of reach."""
        self.time = 0
        robot = self.sim.robots[0]
        robot.init_qpos = self.sim.solve_arm(world_from_ee, self._home)
        self.sim.reset()
        fingers = np.array([FINGER_TRAVEL, -FINGER_TRAVEL])
        self.sim.mj_data.qpos[robot._ref_gripper_joint_pos_indexes] = fingers
        robot.gripper.current_action = np.array([1.0, -1.0])  # open, in the actuators' terms

    def _put(self, name: str, x: float, y: float, floor: float, yaw: float) -> None:
        """Set an object upright on a floor of that height."""
        z = floor - self._boxes[name][0][2]
        quaternion = [np.cos(yaw / 2), 0.0, 0.0, np.sin(yaw / 2)]
        self.sim.sim.data.set_joint_qpos(self.sim.objects[name].joints[0], np.array([x, y, z, *quaternion]))

    def draw_start_pose(self, rng: np.random.Generator) -> np.ndarray:
        """Where the gripper (4, 4) may be when an episode begins."""
        robot = self.scene.robot
        pose = np.eye(4)
        yaw = rng.uniform(-robot.ee_start_yaw_jitter, robot.ee_start_yaw_jitter)
        pose[:3, :3] = gripper_down(np.pi / 2 + yaw)
        pose[:3, 3] = robot.ee_start + rng.uniform(-1, 1, 3) * robot.ee_start_jitter
        return pose

    def _draw_placements(self, rng: np.random.Generator, count: int) -> np.ndarray:
        """x, y and yaw (count, 3), rejected until every pair is far enough apart."""
        spec = self.scene.placement
        low, high = np.transpose([spec.x, spec.y])
        for _ in range(10_000):
            xy = rng.uniform(low, high, (count, 2))
            gaps = np.linalg.norm(xy[:, None] - xy[None], axis=-1)[np.triu_indices(count, 1)]
            if (gaps >= spec.min_distance).all():
                return np.column_stack([xy, rng.uniform(*spec.yaw, count)])
        raise ValueError(
            f"scene {self.scene.name}: placement: {count} objects do not fit {spec.min_distance} m apart into "
            f"x {spec.x}, y {spec.y}; enlarge the region or lower min_distance"
        )

    def _bounding_box(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        model = self.sim.mj_model
        body = model.body(self.sim.objects[name].root_body).id
        corners = []
        for geom in np.flatnonzero(model.geom_bodyid == body):
            rotation = Rotation.from_quat(model.geom_quat[geom][[1, 2, 3, 0]]).as_matrix()
            centre, half = model.geom_aabb[geom][:3], model.geom_aabb[geom][3:]
            signs = np.stack(np.meshgrid([-1, 1], [-1, 1], [-1, 1]), axis=-1).reshape(-1, 3)
            corners.append((centre + signs * half) @ rotation.T + model.geom_pos[geom])
        corners = np.concatenate(corners)
        return corners.min(axis=0), corners.max(axis=0)
