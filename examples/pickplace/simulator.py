"""The robosuite environment behind a scene file: bins, objects, cameras and a Panda under OSC_POSE.

Import it through ``headless.import_headless``: robosuite decides on its OpenGL when it is imported.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from pathlib import Path
from xml.etree import ElementTree

import mujoco
import numpy as np
import robosuite.models.objects
from robosuite.controllers import load_controller_config
from robosuite.environments.manipulation.single_arm_env import SingleArmEnv
from robosuite.models.arenas import BinsArena
from robosuite.models.objects import BoxObject, CylinderObject
from robosuite.models.tasks import ManipulationTask
from robosuite.utils.mjcf_utils import array_to_string, xml_path_completion
from scipy.spatial.transform import Rotation

from examples.errors import SimulatorError
from examples.headless import INSTALL_GL
from examples.pickplace.scene import CameraSpec, ContainerSpec, ObjectSpec, Scene

CONTROL_HZ = 20
_TEXTURES = {
    "floor": "texplane",
    "walls": "tex-light-gray-plaster",
    "source_bin": "tex-light-wood",
    "target_bin": "tex-dark-wood",
}
_HIDDEN_GROUP = 5
_LAMP_DIFFUSE = 0.7  # MuJoCo's default, which robosuite's arenas keep
_MAT_THICKNESS = 0.002  # m; it is seen, and nothing touches it


class PickPlaceSim(SingleArmEnv):
    """robosuite's bins with the objects and cameras of a scene; steps physics, renders nothing by itself."""

    def __init__(self, scene: Scene) -> None:
        self.scene = scene
        controller = load_controller_config(default_controller="OSC_POSE")
        controller["kp"] = scene.robot.stiffness
        super().__init__(
            robots="Panda",
            controller_configs=controller,
            initialization_noise=None,
            use_camera_obs=False,
            has_renderer=False,
            has_offscreen_renderer=False,
            control_freq=CONTROL_HZ,
            ignore_done=True,
            hard_reset=False,
        )

    def _load_model(self) -> None:
        super()._load_model()
        robot = self.robots[0].robot_model
        robot.set_base_xpos(robot.base_xpos_offset["bins"])
        arena = BinsArena(bin1_pos=self.scene.arena.source_bin)
        arena.set_origin([0, 0, 0])
        arena.bin1_body.set("pos", array_to_string(np.array(self.scene.arena.source_bin)))
        arena.bin2_body.set("pos", array_to_string(np.array(self.scene.arena.target_bin)))
        for part, texture in _TEXTURES.items():
            path = Path(xml_path_completion(f"textures/{getattr(self.scene.background, part)}"))
            if not path.is_file():
                raise ValueError(
                    f"scene {self.scene.name}: background.{part}: {path.name} is not among robosuite's textures "
                    f"({', '.join(sorted(file.name for file in path.parent.iterdir()))})"
                )
            arena.asset.find(f"texture[@name='{texture}']").set("file", str(path))
        for lamp in arena.worldbody.findall("light"):
            lamp.set("diffuse", array_to_string(_LAMP_DIFFUSE * np.array(self.scene.background.light)))
        for name, container in self.scene.containers.items():
            if container.color is not None:
                _add_mat(arena.worldbody, name, container)
        self.objects = {}
        for name, spec in self.scene.objects.items():
            self.objects[name] = self._make_object(name, spec)
        self.model = ManipulationTask(arena, [robot], list(self.objects.values()))
        for name, camera in self.scene.cameras.items():
            self._add_camera(name, camera)

    def _make_object(self, name: str, spec: ObjectSpec):
        if spec.shape is not None:
            kind = {"box": BoxObject, "cylinder": CylinderObject}[spec.shape.kind]
            shape = spec.shape
            return kind(
                name=name,
                size=list(shape.size),
                rgba=[0.5, 0.5, 0.5, 1.0],
                density=shape.density,
                friction=list(shape.friction),
            )
        model = getattr(robosuite.models.objects, spec.model, None)
        if model is None:
            raise ValueError(
                f"scene {self.scene.name}: objects.{name}.model: robosuite.models.objects has no {spec.model}"
            )
        return model(name=name)

    def _add_camera(self, name: str, spec: CameraSpec) -> None:
        worldbody = self.model.worldbody
        parent = worldbody if spec.body is None else worldbody.find(f".//body[@name='{spec.body}']")
        if parent is None:
            raise ValueError(f"scene {self.scene.name}: cameras.{name}.body: the simulation has no body {spec.body!r}")
        ElementTree.SubElement(
            parent,
            "camera",
            name=name,
            mode="fixed",
            pos=array_to_string(np.array(spec.position)),
            quat=array_to_string(camera_quaternion(spec)),
            fovy=str(spec.fovy),
        )

    def _setup_observables(self) -> OrderedDict:
        return OrderedDict()  # state is read from MuJoCo when asked for, not 25 times per control step

    def reward(self, action=None) -> float:
        return 0.0  # success is judged by PickPlaceEnv.success, per task

    def step(self, action: np.ndarray) -> None:
        """One control step of ``action`` (7,): 25 physics steps.

        robosuite's own step differs only in running MuJoCo's forward pass once more per physics step than the
        controller already does, and in collecting observations.
        """
        self.timestep += 1
        for i in range(int(self.control_timestep / self.model_timestep)):
            self._pre_action(action, policy_step=i == 0)
            self.sim.step()
        self.sim.forward()
        self.cur_time += self.control_timestep

    def solve_arm(self, world_from_ee: np.ndarray, start: np.ndarray) -> np.ndarray:
        """Arm joints (7,) that bring the grip site to ``world_from_ee`` (4, 4), by damped least squares.

        Raises ``ValueError`` where the pose is out of reach.
        """
        model, data = self.mj_model, mujoco.MjData(self.mj_model)
        robot = self.robots[0]
        columns = robot._ref_joint_vel_indexes
        joints = np.array(start, dtype=np.float64)
        jacobian = np.zeros((6, model.nv))
        for _ in range(100):
            data.qpos[robot._ref_joint_pos_indexes] = joints
            mujoco.mj_kinematics(model, data)
            mujoco.mj_comPos(model, data)
            rotation = world_from_ee[:3, :3] @ data.site_xmat[robot.eef_site_id].reshape(3, 3).T
            error = np.concatenate(
                [world_from_ee[:3, 3] - data.site_xpos[robot.eef_site_id], Rotation.from_matrix(rotation).as_rotvec()]
            )
            if np.abs(error).max() < 1e-4:
                return joints
            mujoco.mj_jacSite(model, data, jacobian[:3], jacobian[3:], robot.eef_site_id)
            J = jacobian[:, columns]  # (6, 7)
            joints += J.T @ np.linalg.solve(J @ J.T + 1e-4 * np.eye(6), error)
        raise ValueError(f"the arm cannot reach {np.round(world_from_ee[:3, 3], 3)}; check robot.ee_start in the scene")

    @property
    def mj_model(self) -> mujoco.MjModel:
        return self.sim.model._model

    @property
    def mj_data(self) -> mujoco.MjData:
        return self.sim.data._data


def camera_quaternion(spec: CameraSpec) -> np.ndarray:
    """Orientation (4,), w first, of a camera in MuJoCo's axes: it looks along its -z, y is up."""
    backward = np.subtract(spec.position, spec.look_at)
    backward /= np.linalg.norm(backward)
    up = np.array([0.0, 0.0, 1.0]) if spec.body is None else np.array([1.0, 0.0, 0.0])
    if abs(up @ backward) > 0.999:
        up = np.array([0.0, 1.0, 0.0])
    right = np.cross(up, backward)
    right /= np.linalg.norm(right)
    axes = np.stack([right, np.cross(backward, right), backward], axis=1)
    return Rotation.from_matrix(axes).as_quat()[[3, 0, 1, 2]]


def _add_mat(worldbody: ElementTree.Element, name: str, container: ContainerSpec) -> None:
    centre = [np.mean(container.x), np.mean(container.y), container.floor]
    size = [np.ptp(container.x) / 2, np.ptp(container.y) / 2, _MAT_THICKNESS / 2]
    ElementTree.SubElement(
        worldbody,
        "geom",
        name=f"{name}_mat",
        type="box",
        pos=array_to_string(np.array(centre)),
        size=array_to_string(np.array(size)),
        rgba=array_to_string(np.array([*container.color, 1.0])),
        conaffinity="0",
        contype="0",
        group="1",
    )


class CameraRenderer:
    """Renders the scene's cameras, upright, at ``height`` x ``width``; cheap enough for a CPU.

    Raises ``SimulatorError`` where OpenGL does not start.

    No multi-sampling, shadows or reflections, and geometry outside a camera's view is not sent to OpenGL at all:
    on two CPU cores the arm's meshes are most of the cost.
    """

    def __init__(self, sim: PickPlaceSim, height: int, width: int) -> None:
        self._model, self._data = sim.mj_model, sim.mj_data
        self.height, self.width = height, width
        self._model.vis.global_.offheight = height
        self._model.vis.global_.offwidth = width
        self._model.vis.quality.offsamples = 0
        try:
            self._renderer = mujoco.Renderer(self._model, height=height, width=width)
        except (ImportError, RuntimeError, mujoco.FatalError) as error:
            gl = os.environ["MUJOCO_GL"]
            raise SimulatorError(
                f"MUJOCO_GL={gl} loads but cannot render here ({error}); "
                f"set MUJOCO_GL={'osmesa' if gl == 'egl' else 'egl'}, or run: {INSTALL_GL}"
            ) from error
        for flag in (mujoco.mjtRndFlag.mjRND_SHADOW, mujoco.mjtRndFlag.mjRND_REFLECTION):
            self._renderer.scene.flags[flag] = 0
        self._options = mujoco.MjvOption()
        self._options.geomgroup[:] = 0
        self._options.geomgroup[1] = 1  # robosuite's visual geometry
        self._options.sitegroup[:] = 0
        for geom in range(self._model.ngeom):  # the robot's pedestal: most triangles of all, and nothing to see
            if self._model.body(self._model.geom_bodyid[geom]).name.startswith("mount0_"):
                self._model.geom_group[geom] = _HIDDEN_GROUP
        signs = np.stack(np.meshgrid([-1, 1], [-1, 1], [-1, 1]), axis=-1).reshape(8, 3)
        centre, half = self._model.geom_aabb[:, None, :3], self._model.geom_aabb[:, None, 3:]
        self._corners = centre + signs * half  # (G, 8, 3) of each geom's box, in its own frame

    def rgb(self, camera: str) -> np.ndarray:
        """Image (H, W, 3) uint8, first row on top."""
        hidden = self._out_of_view(camera)
        groups = self._model.geom_group[hidden].copy()
        self._model.geom_group[hidden] = _HIDDEN_GROUP
        self._renderer.update_scene(self._data, camera, self._options)
        self._model.geom_group[hidden] = groups
        return self._renderer.render()

    def segmentation(self, camera: str) -> np.ndarray:
        """MuJoCo geom number per pixel (H, W) int32, -1 for the background."""
        self._renderer.enable_segmentation_rendering()
        self._renderer.update_scene(self._data, camera, self._options)
        ids = self._renderer.render()
        self._renderer.disable_segmentation_rendering()
        return np.where(ids[..., 1] == mujoco.mjtObj.mjOBJ_GEOM, ids[..., 0], -1)

    def intrinsics(self, camera: str) -> np.ndarray:
        """K (3, 3) in pixels, from MuJoCo's vertical field of view."""
        focal = 0.5 * self.height / np.tan(0.5 * np.deg2rad(self._model.camera(camera).fovy[0]))
        return np.array([[focal, 0.0, 0.5 * self.width], [0.0, focal, 0.5 * self.height], [0.0, 0.0, 1.0]])

    def world_from_cam(self, camera: str) -> np.ndarray:
        """Pose (4, 4) of the camera in OpenCV axes (x right, y down, z forward)."""
        view = self._data.camera(camera)
        pose = np.eye(4)
        pose[:3, :3] = view.xmat.reshape(3, 3) * np.array([1.0, -1.0, -1.0])  # MuJoCo: y up, z backward
        pose[:3, 3] = view.xpos
        return pose

    def close(self) -> None:
        self._renderer.close()

    def _out_of_view(self, camera: str) -> np.ndarray:
        """Numbers of the geoms whose bounding box lies wholly beyond one of the planes that bound the view."""
        world_from_cam, K = self.world_from_cam(camera), self.intrinsics(camera)
        rotations = self._data.geom_xmat.reshape(-1, 3, 3)
        corners = np.einsum("gij,gcj->gci", rotations, self._corners) + self._data.geom_xpos[:, None]  # (G, 8, 3)
        corners = (corners - world_from_cam[:3, 3]) @ world_from_cam[:3, :3]
        x, y, z = np.moveaxis(corners, -1, 0)
        half_x, half_y = K[0, 2] / K[0, 0], K[1, 2] / K[1, 1]
        sides = (z < 0, x > half_x * z, x < -half_x * z, y > half_y * z, y < -half_y * z)
        outside = np.any([side.all(axis=1) for side in sides], axis=0)
        return np.flatnonzero(outside & (self._model.geom_rbound > 0))  # infinite planes have no bound
