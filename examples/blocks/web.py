"""A page with a world of blocks and a policy in it: tell it what to do, change your mind, push things about.

All who open the page see and steer the same world. The simulator and the policy run in one thread, at most as fast as
the robot would; the page's own threads only leave wishes for it.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from apt.training.pictures import gate_picture, gate_table
from data_utils.drawing.paths import PREDICTED
from examples.blocks.env import BlocksEnv
from examples.blocks.live import LiveWorld
from examples.pickplace.video import camera_views

CONTROL_SECONDS = 0.05
IMAGE_EVERY = 2  # control steps between two pictures of the cameras
_FAR = ("mount0_pedestal", "mount0_torso")  # bodies of many faces that stand behind the table


@dataclass
class Page:
    """The elements that change, as viser's handles."""

    status: object
    instruction: object
    cameras: object
    bodies: dict[int, object] = field(default_factory=dict)  # MuJoCo body -> mesh
    path: object | None = None
    shown: np.ndarray | None = None  # the poses that ``path`` was made of


class DemoServer:
    """Serves the page while it runs.

    Args:
        planner: a ``TrajPlanner`` of the policy.
        make_env: makes the world, in the thread that will run it.
        host, port: where to listen; anybody who can reach it can steer the world.
        instruction: to begin with; None: an example that waits.
    Raises:
        ImportError: viser is not installed.
        OSError: the port is taken.
    """

    def __init__(
        self,
        planner,
        make_env: Callable[[], BlocksEnv],
        host: str = "127.0.0.1",
        port: int = 8080,
        seed: int = 0,
        instruction: str | None = None,
    ) -> None:
        try:
            import viser
        except ImportError as error:
            raise ImportError("the page needs viser, which is not installed; pip install viser") from error
        _check_port(host, port)
        self._planner, self._make_env, self._seed, self._first = planner, make_env, seed, instruction
        self._server = viser.ViserServer(host=host, port=port, label="APT: blocks", verbose=False)
        self._wishes: queue.Queue[Callable[[LiveWorld], None]] = queue.Queue()
        self._closing = threading.Event()
        self._page = self._lay_out()
        self.url = f"http://{host}:{self._server.get_port()}"

    # -- the page ------------------------------------------------------------------------------------------------------

    def _lay_out(self) -> Page:
        gui = self._server.gui
        gui.configure_theme(control_layout="fixed", control_width="large", show_logo=False, show_share_button=False)
        status = gui.add_markdown("**starting**")
        instruction = gui.add_text("instruction", "", hint="name a block and a tray that are there")
        go = gui.add_button("Go", color="green", hint="do it, also in the middle of something else")
        push = gui.add_button("Push a block")
        new = gui.add_button("New scene")
        cameras = gui.add_image(
            np.zeros((2, 4, 3), np.uint8), label="what the policy sees, and its path", format="jpeg", jpeg_quality=85
        )
        expert = self._planner.policy.model.expert
        table = gate_table(expert, self._planner.train_config.vlm_layer_stride)
        if table:
            with gui.add_folder("gates between expert and VLM", expand_by_default=False):
                gui.add_image(gate_picture(table), format="png")
        go.on_click(lambda _: self._wishes.put(lambda world: world.instruct(instruction.value)))
        push.on_click(lambda _: self._wishes.put(LiveWorld.push))
        new.on_click(lambda _: self._wishes.put(self._new_scene))
        return Page(status, instruction, cameras)

    def _new_scene(self, world: LiveWorld) -> None:
        world.new_scene()
        self._page.instruction.value = world.env.prompt
        self._color(world.env)

    def _build_scene(self, env: BlocksEnv) -> None:
        """The robot and the bins, which stay."""
        from examples.blocks.meshes import body_mesh, visible_geoms  # MuJoCo: after OpenGL has been chosen

        scene, model = self._server.scene, env.sim.mj_model
        scene.set_up_direction("+z")
        scene.add_grid("/floor", width=4, height=4, position=(0.0, 0.0, 0.0), cell_size=0.2)
        self._server.initial_camera.position = (0.95, 0.0, 1.6)
        self._server.initial_camera.look_at = (0.0, 0.0, 0.88)
        slots = {model.body(env.sim.objects[slot].root_body).id for slot in env.scene.objects}
        far = {model.body(name).id for name in _FAR}
        for body, geoms in visible_geoms(model).items():
            if body not in slots | far | {0}:
                self._page.bodies[body] = scene.add_mesh_trimesh(f"/body_{body}", body_mesh(model, geoms))

    def _color(self, env: BlocksEnv) -> None:
        """Blocks and trays, whose colours every scene draws."""
        from examples.blocks.meshes import body_mesh, visible_geoms

        scene, model = self._server.scene, env.sim.mj_model
        for name in env.world.trays:  # whose mats belong to the world's body
            scene.add_mesh_trimesh(f"/mat_{name}", body_mesh(model, [model.geom(f"{name}_mat").id]))
        geoms = visible_geoms(model)
        for slot in env.scene.objects:
            body = model.body(env.sim.objects[slot].root_body).id
            handle = scene.add_mesh_trimesh(f"/block_{slot}", body_mesh(model, geoms[body]))
            handle.visible = slot in env.present
            self._page.bodies[body] = handle

    def _show(self, world: LiveWorld, step: int) -> None:
        """What changed since the control step before."""
        env, data = world.env, world.env.sim.mj_data
        with self._server.atomic():
            for body, handle in self._page.bodies.items():
                handle.position, handle.wxyz = data.xpos[body], data.xquat[body]
            if world.path is not None and world.path is not self._page.shown:  # a new plan
                self._page.path = self._server.scene.add_spline_catmull_rom(
                    "/path", world.path[:, :3, 3], color=PREDICTED, thickness=3.0, thickness_units="screen"
                )
            elif world.path is None and self._page.path is not None:
                self._page.path.remove()
                self._page.path = None
            self._page.shown = world.path
        if (text := str(world.status)) != self._page.status.content:
            self._page.status.content = text
        if step % IMAGE_EVERY == 0:
            self._page.cameras.image = camera_views(env, world.path)

    # -- the world's thread --------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Simulate until :meth:`close`, then stop serving; in the calling thread, which will own OpenGL."""
        try:
            self._run()
        finally:
            self._server.stop()

    def _run(self) -> None:
        with self._make_env() as env:
            world = LiveWorld(env, self._planner, self._seed)
            if self._first is not None:
                env.reset_for([self._seed, 0], self._first)
                world.instruct(self._first)
            self._build_scene(env)
            self._color(env)
            self._page.instruction.value = env.prompt
            step = 0
            while not self._closing.is_set():
                began = time.monotonic()
                while not self._wishes.empty():
                    self._wishes.get()(world)
                world.step()
                self._show(world, step)
                step += 1
                self._closing.wait(max(0.0, CONTROL_SECONDS - (time.monotonic() - began)))

    def close(self) -> None:
        """End :meth:`run`, from any thread."""
        self._closing.set()


def _check_port(host: str, port: int) -> None:
    """viser takes the next free port where one is taken, which nobody would look at."""
    import socket

    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise OSError(f"cannot listen on {host}:{port}: {error.strerror}; give another --port") from error
