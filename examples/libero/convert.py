"""LIBERO's demonstrations: robomimic-style HDF5 without camera poses, so that every one is replayed in the simulator.

Files hold ``data/demo_i/{actions, states}`` and the attributes ``bddl_file_name``, ``problem_info`` (of ``data``) and
``model_file`` (of a demonstration). What is written is what the replay shows; a time unit is one control step.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from xml.etree import ElementTree

import h5py
import numpy as np
from scipy.spatial.transform import Rotation

from data_utils.convert.provenance import state_of
from data_utils.convert.runner import Job, Skipped
from data_utils.errors import DataError
from data_utils.h5io import CameraData, EpisodeData
from data_utils.words import one_line
from examples.control import MAX_ROTATION, MAX_TRANSLATION
from examples.errors import SimulatorError
from examples.libero import environment
from examples.libero.tasks import LiberoTask, find_task

if TYPE_CHECKING:
    from examples.libero.simulator import LiberoEnv

NOOP = 1e-4  # of an action's six numbers for the arm: below it, the arm is told to stay
STATE_ATTR, FIXTURES_ATTR = "libero_initial_state", "libero_fixtures"
TASK_ATTR, BENCHMARK_ATTR = "libero_task", "libero_benchmark"


@dataclass(frozen=True)
class LiberoSettings:
    src: tuple[Path, ...]
    """LIBERO's HDF5 files, or folders of them."""
    image_size: int = 256
    """Height and width of the images, in pixels."""
    keep_noops: bool = False
    """Keep the steps at which nothing was commanded."""


@dataclass(frozen=True)
class Demo:
    """A demonstration as it was recorded."""

    source: str  # file and name, for people
    task: LiberoTask
    prompts: list[str]
    actions: np.ndarray  # (N, 7) in [-1, 1]
    initial_state: np.ndarray  # (D,) MuJoCo state that the first action starts from
    model_xml: str


class LiberoConverter:
    """Episodes ``<suite>/<task>/demo_0000``: one for every demonstration whose replay ends in success."""

    def __init__(self, settings: LiberoSettings) -> None:
        if not 16 <= settings.image_size <= 2048:
            raise DataError(f"--image-size is {settings.image_size}; wanted 16 to 2048 pixels", "image")
        self.settings = settings
        self._env: LiberoEnv | None = None  # of the task of the last episode; building one takes seconds

    def described(self) -> dict:
        """What the episodes depend on: the settings and the simulator's versions.

        These are LIBERO's interpreter's to say, so the command goes on there from here on.
        """
        try:
            environment.enter_libero("data_utils.convert")
            environment.check_assets()
        except SimulatorError as error:
            raise DataError(str(error), "location") from error
        settings = self.settings
        return {
            "src": [str(path.resolve()) for path in settings.src],
            "image_size": settings.image_size,
            "keep_noops": settings.keep_noops,
            "simulator": environment.versions(),
        }

    def jobs(self) -> list[Job]:
        jobs: dict[str, Job] = {}
        for path in _files(self.settings.src):
            suite, demos = _listing(path)
            for demo in demos:
                job = Job(f"{suite}/{path.stem.removesuffix('_demo')}/demo_{int(demo[5:]):04d}", (str(path), demo))
                if job.name in jobs:
                    other = jobs[job.name].key[0]
                    raise DataError(f"{path}: {demo} is also in {other}; name one of the two in --src", "location")
                jobs[job.name] = job
        return list(jobs.values())

    def made_from(self, job: Job) -> dict:
        return {"files": state_of([job.key[0]])}

    def convert(self, job: Job) -> EpisodeData:
        path, name = job.key
        try:
            demo = read_demo(Path(path), name)
            kept = np.arange(len(demo.actions)) if self.settings.keep_noops else kept_steps(demo.actions)
            if len(kept) < 2:
                raise Skipped("fewer than 2 steps command anything")
            return self._replay(demo, kept)
        except SimulatorError as error:
            raise DataError(f"{path}: {name}: {error}", "location") from error

    def _replay(self, demo: Demo, kept: np.ndarray) -> EpisodeData:
        env = self._environment(demo.task)
        env.reset()
        try:
            env.set_fixtures(env.fixtures_of(demo.model_xml))
        except ElementTree.ParseError as error:
            raise DataError(f"{demo.source}: model_file is not MuJoCo's XML ({error}); fetch it again") from error
        try:
            env.set_state(demo.initial_state)
        except ValueError as error:
            raise DataError(f"{demo.source}: states: {error}; it was recorded in another scene", "schema") from error
        recording = Recording(env)
        for action in demo.actions[kept]:
            recording.add(action)
            env.step(action)
        if not env.success():
            raise Skipped("the replay does not end in success")
        attributes = recording.origin(demo.source, demo.initial_state)
        return recording.episode(demo.prompts, attributes | {"libero_steps_dropped": len(demo.actions) - len(kept)})

    def _environment(self, task: LiberoTask) -> "LiberoEnv":
        if self._env is None or self._env.task != task:
            if self._env is not None:
                self._env.close()
                self._env = None
            try:
                simulator = environment.import_simulator()
            except ImportError as error:
                raise SimulatorError(str(error)) from error
            self._env = simulator.LiberoEnv(task, self.settings.image_size)
        return self._env


class Recording:
    """What an environment shows, step by step, each before its action is executed."""

    def __init__(self, env: "LiberoEnv") -> None:
        self.env = env
        self.fixtures = env.fixtures
        self.ee: list[np.ndarray] = []
        self.gripper: list[float] = []
        self.ee_desired: list[np.ndarray] = []
        self.gripper_desired: list[float] = []
        self.frames = {camera: [] for camera in env.cameras}
        self.poses = {camera: [] for camera in env.cameras}

    def add(self, action: np.ndarray) -> None:
        """``action`` (7,) is about to be executed."""
        world_from_ee = self.env.world_from_ee
        target, openness = set_point(world_from_ee, action, self.env.held_orientation)
        self.ee.append(world_from_ee)
        self.gripper.append(self.env.openness)
        self.ee_desired.append(target)
        self.gripper_desired.append(openness)
        for camera in self.frames:
            self.frames[camera].append(self.env.rgb(camera))
            self.poses[camera].append(self.env.world_from_cam(camera))

    def origin(self, source: str, initial_state: np.ndarray) -> dict[str, str]:
        """Attributes of the episode that say where it comes from, and all that it takes to repeat it.

        Args:
            source: for people.
            initial_state: (D,) of the first frame.
        """
        task = self.env.task
        versions = environment.versions(task.benchmark)
        return {
            "source": source,
            "source_format": task.benchmark,
            TASK_ATTR: f"{task.suite}/{task.name}",
            BENCHMARK_ATTR: task.benchmark,
            STATE_ATTR: json.dumps(initial_state.tolist()),  # texts of floats are exact
            FIXTURES_ATTR: json.dumps({name: pose.tolist() for name, pose in self.fixtures.items()}),
            "libero_versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
        }

    def episode(self, prompts: list[str], attributes: dict) -> EpisodeData:
        cameras = {
            camera: CameraData(_still(self.poses[camera]), self.env.intrinsics(camera), frames)
            for camera, frames in self.frames.items()
        }
        return EpisodeData(
            timestamp=np.arange(len(self.ee), dtype=np.float64),
            world_from_ee=np.stack(self.ee)[:, None],  # (T, 1, 4, 4)
            gripper=np.array(self.gripper)[:, None],
            prompts=prompts,
            cameras=cameras,
            world_from_ee_desired=np.stack(self.ee_desired)[:, None],
            gripper_desired=np.array(self.gripper_desired)[:, None],
            attributes=attributes,
        )


def kept_steps(actions: np.ndarray) -> np.ndarray:
    """Numbers (K,) of the steps of ``actions`` (N, 7) that command something: a motion, or another gripper command
    than the kept step before."""
    kept: list[int] = []
    for step, action in enumerate(actions):
        moves = np.abs(action[:6]).max() >= NOOP
        if moves or (kept and np.sign(action[6]) != np.sign(actions[kept[-1], 6])):
            kept.append(step)
    return np.array(kept, np.int64)


def set_point(world_from_ee: np.ndarray, action: np.ndarray, held: np.ndarray) -> tuple[np.ndarray, float]:
    """The pose (4, 4) and openness that an OSC_POSE ``action`` (7,) tells a gripper at ``world_from_ee`` to take.

    An action that turns nothing, to the last bit, leaves the controller's goal at the orientation ``held`` (3, 3): a
    turn that was commanded before goes on. Its position goal is set anew by every action.
    """
    offset = np.clip(action[:6], -1.0, 1.0)
    target = np.eye(4)
    turn = Rotation.from_rotvec(MAX_ROTATION * offset[3:]).as_matrix()
    target[:3, :3] = turn @ world_from_ee[:3, :3] if offset[3:].any() else held
    target[:3, 3] = world_from_ee[:3, 3] + MAX_TRANSLATION * offset[:3]
    return target, 0.0 if action[6] > 0 else 1.0


def read_demo(path: Path, name: str) -> Demo:
    """One demonstration. Raises DataError for what the file lacks, ``SimulatorError`` for a task not installed."""
    try:
        with h5py.File(path, "r") as file:
            data = file["data"]
            demo = data[name]
            actions, states = demo["actions"][()], demo["states"][()]
            bddl, problem = _text(data, "bddl_file_name"), json.loads(_text(data, "problem_info"))
            model_xml = _text(demo, "model_file")
            if reference := re.fullmatch(r"as (demo_\d+)", model_xml):  # some recorders write the scene once
                model_xml = _text(data[reference[1]], "model_file")
    except (OSError, RuntimeError) as error:
        raise DataError(f"{path}: cannot be read ({one_line(error)}); fetch it again", "file") from error
    except (KeyError, ValueError) as error:
        what = f"{name}: is not a demonstration of LIBERO ({one_line(error)}); wanted its own HDF5 files"
        raise DataError(f"{path}: {what}", "schema") from error
    if actions.ndim != 2 or actions.shape[1:] != (7,) or not np.isfinite(actions).all():
        raise DataError(f"{path}: {name}/actions has shape {actions.shape}; wanted finite numbers (N, 7)", "schema")
    if states.ndim != 2 or not len(states) or not np.isfinite(states).all():
        raise DataError(f"{path}: {name}/states has shape {states.shape}; wanted finite numbers (N, D)", "schema")
    task = find_task(bddl)
    prompts = list(dict.fromkeys([_language(problem) or task.language, task.language]))
    return Demo(f"{path.name}:{name}", task, prompts, actions.astype(np.float64), states[0], model_xml)


def _files(sources: tuple[Path, ...]) -> list[Path]:
    files = []
    for source in sources:
        found = sorted(source.rglob("*.hdf5")) if source.is_dir() else [source] if source.is_file() else []
        if not found:
            raise DataError(f"{source}: no such HDF5 file, nor a folder with any; check --src", "location")
        files += [path.resolve() for path in found]
    return list(dict.fromkeys(files))


def _listing(path: Path) -> tuple[str, list[str]]:
    """The suite a file belongs to, which is its goal file's folder on whatever machine, and its demonstrations."""
    try:
        with h5py.File(path, "r") as file:
            names = [name for name in file["data"] if re.fullmatch(r"demo_\d+", name)]
            folders = re.split(r"[\\/]", _text(file["data"], "bddl_file_name"))[:-1]
    except (OSError, RuntimeError, KeyError) as error:
        what = f"is not one of LIBERO's HDF5 files ({one_line(error)}); name others, or fetch it again"
        raise DataError(f"{path}: {what}", "file") from error
    return folders[-1] if folders else path.parent.name, sorted(names, key=lambda name: int(name[5:]))


def _language(problem: dict) -> str:
    """The instruction in ``problem_info``; some releases hold a list of words, some quote it."""
    language = problem.get("language_instruction", "")
    text = language if isinstance(language, str) else " ".join(language)
    return text.strip().strip('"').strip()


def _text(item: h5py.Group, key: str) -> str:
    value = item.attrs[key]
    return value.decode() if isinstance(value, bytes) else str(value)


def _still(poses: list[np.ndarray]) -> np.ndarray:
    """(T, 4, 4), or (4, 4) where the camera stands still."""
    stacked = np.stack(poses)
    return stacked[0] if (stacked == stacked[0]).all() else stacked
