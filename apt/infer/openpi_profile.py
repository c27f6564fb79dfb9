"""Foreign observations as this library's frames: profiles, YAML files that say what another program's keys mean.

Poses, grippers, intrinsics and cameras are told in the words of mapping files (docs/convert.md); an observation stands
for an episode of one frame.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.spatial.transform import Rotation

from data_utils.convert.assemble import ArmTrack, by_name_and_number, camera_data
from data_utils.convert.mapping import Arm, Camera
from data_utils.convert.values import Evaluator
from data_utils.errors import DataError
from data_utils.yaml_file import Wrong, YamlFile, read_yaml

PROFILES = Path(__file__).parent / "openpi_profiles"
KINDS = ("poses", "deltas")
GRIPPER_OPENS = 0.5  # openness from which on a gripper that knows open and closed alone is told to open


@dataclass(frozen=True)
class Actions:
    """What the client wants: absolute ``poses``, or ``deltas``, what robosuite's OSC_POSE executes open loop.

    A row of deltas is the way from one control step's target to the next, as a share of ``translation`` (m) and
    ``rotation`` (rad), both in [-1, 1], and +1 to close the gripper or -1 to open it.
    """

    kind: str
    translation: float | None = None
    rotation: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise Wrong(f"kind is {self.kind!r}; wanted {' or '.join(KINDS)}")
        units = (self.translation, self.rotation)
        if self.kind == "deltas" and not all(unit is not None and unit > 0 for unit in units):
            raise Wrong("deltas want translation (m) and rotation (rad) above 0, what 1 stands for")
        if self.kind == "poses" and units != (None, None):
            raise Wrong("poses have no units: leave translation and rotation out")


@dataclass(frozen=True)
class Profile:
    """What a program sends.

    Args:
        mirrored: cameras whose images come with left and right swapped.
        letterboxed: images were fitted into their size with black borders; ``K.size`` is that before.
        control_steps_per_query: how many rows the client executes before it asks again.
    """

    arms: tuple[Arm, ...]
    cameras: dict[str, Camera]
    prompt: str = "prompt"
    mirrored: tuple[str, ...] = ()
    letterboxed: bool = False
    actions: Actions = Actions("poses")
    control_steps_per_query: int | None = None

    def __post_init__(self) -> None:
        names = [arm.name for arm in self.arms]
        for name, camera in self.cameras.items():
            if camera.on_arm is not None and names.count(camera.on_arm) != 1:
                raise Wrong(f"cameras.{name}.on_arm is {camera.on_arm!r}; the arms are {names}")
            if camera.world_from_cam_at_first_frame is not None:
                raise Wrong(f"cameras.{name}: where it stood at a first frame says nothing of a later one")
            if self.letterboxed and camera.K is None:
                raise Wrong(
                    f"cameras.{name} has a rig; letterboxed images cannot be undistorted, write K and poses out"
                )
            if self.letterboxed and camera.K.size is None:
                raise Wrong(f"cameras.{name}.K has no size; letterboxed images want that before the borders")
        if not self.arms or not self.cameras:
            raise Wrong("needs at least one of each: arms, cameras")
        if strange := [name for name in self.mirrored if name not in self.cameras]:
            raise Wrong(f"mirrored names {strange[0]!r}; the cameras are {', '.join(self.cameras)}")
        if self.actions.kind == "deltas" and len(self.arms) != 1:
            raise Wrong("actions of kind deltas are of one arm")
        if self.control_steps_per_query is not None and self.control_steps_per_query < 1:
            raise Wrong(f"control_steps_per_query is {self.control_steps_per_query}; wanted 1 or more")


class ProfileReader:
    """Observations of one profile.

    Args:
        name: path of a YAML file, or a file's name in ``openpi_profiles`` without suffix; of one with scenes followed
            by a colon and the scene.
    Raises:
        ValueError: no such profile or scene, or what is wrong in the file, with its line.
    """

    def __init__(self, name: str) -> None:
        self.file, scene = _find(name)
        self.name = name
        self.profile: Profile = _in_scene(read_yaml(self.file), scene).build(Profile)
        for number, arm in enumerate(self.profile.arms):
            if arm.pose.robot is None:
                continue
            try:
                arm.pose.robot.open(self.file)
            except DataError as error:
                what = f"arms[{number}].pose: {error}"
                raise ValueError(f"{what}; where this is a template, copy it and fill in your rig") from error

    def frame(self, observation: Mapping[str, Any]) -> dict[str, Any]:
        """Without its ``timestamp``, as :func:`apt.infer.frames.parse_frame` takes it.

        Raises:
            ValueError: names the key of the observation that is missing or wrong.
        """
        cameras = self.profile.cameras.values() if self.profile.letterboxed else ()
        seen = _Seen(observation, {camera.frames: camera.K.size for camera in cameras})
        evaluate = Evaluator(seen, self.file.parent, self.file)
        arms = [ArmTrack(arm, number, evaluate, 1) for number, arm in enumerate(self.profile.arms)]
        poses = by_name_and_number(self.profile.arms, arms)
        frame: dict[str, Any] = {
            "ee_pose": np.concatenate([arm.world_from_ee for arm in arms]),
            "gripper": np.concatenate([arm.gripper for arm in arms]),
        }
        for name, camera in self.profile.cameras.items():
            data = camera_data(f"cameras.{name}", camera, seen, evaluate, poses)
            image = data.frames[0]
            K = data.K.copy()
            K[:2, 2] += seen.border(camera.frames)
            if name in self.profile.mirrored:
                image = image[:, ::-1]
            frame[name] = {
                "model": "pinhole",
                "camera": {"width": image.shape[1], "height": image.shape[0], "K": K},
                "data": {"color": np.ascontiguousarray(image), "wcT": data.world_from_cam, "seg": None},
            }
        return frame

    def deltas(self, world_from_ee: np.ndarray, poses: np.ndarray, openness: np.ndarray) -> np.ndarray:
        """Rows (T, 7) float32 that lead from ``world_from_ee`` (4, 4) over ``poses`` (T, 4, 4), with openness (T,)."""
        units = self.profile.actions
        before = np.concatenate([world_from_ee[None], poses[:-1]])
        moved = (poses[:, :3, 3] - before[:, :3, 3]) / units.translation
        turned = Rotation.from_matrix(poses[:, :3, :3] @ before[:, :3, :3].transpose(0, 2, 1)).as_rotvec()
        closes = np.where(openness >= GRIPPER_OPENS, -1.0, 1.0)[:, None]
        ways = np.clip(np.hstack([moved, turned / units.rotation]), -1, 1)
        return np.hstack([ways, closes]).astype(np.float32)


class _Seen:
    """An observation as an episode of one frame (:class:`data_utils.convert.values.Recording`)."""

    place, length, index, video_root, fps = "the observation", 1, 0, None, None

    def __init__(self, observation: Mapping[str, Any], fitted: dict[str, tuple[int, int]]) -> None:
        """``fitted``: images that were fitted between black borders, and their (width, height) before."""
        self._observation, self._fitted = observation, fitted
        self._images: dict[str, np.ndarray] = {}
        self.columns = tuple(str(key) for key in observation)

    def numbers(self, column: str) -> np.ndarray:
        value = np.asarray(self._observation[column])
        if value.dtype.kind not in "iuf":
            raise ValueError(f"{column} is {value.dtype}; wanted numbers")
        return value.astype(np.float64).reshape(1, -1)

    def frames(self, column: str, flip_rows: bool) -> list[np.ndarray]:
        image = self._image(column)
        return [image[::-1] if flip_rows else image]

    def frame_size(self, column: str) -> tuple[int, int]:
        """Width and height of what an image shows, borders left out."""
        height, width = self._image(column).shape[:2]
        if column not in self._fitted:
            return width, height
        before = self._fitted[column]
        shrunk = max(before[0] / width, before[1] / height)
        return int(before[0] / shrunk), int(before[1] / shrunk)

    def border(self, column: str) -> np.ndarray:
        """(2,) px to the left and above of what an image shows."""
        height, width = self._image(column).shape[:2]
        shown = self.frame_size(column)
        return np.array([(width - shown[0]) // 2, (height - shown[1]) // 2], np.float64)

    def _image(self, column: str) -> np.ndarray:
        if column not in self._images:
            self._images[column] = _as_rgb(column, self._observation[column])
        return self._images[column]


def _as_rgb(column: str, sent: Any) -> np.ndarray:
    """(H, W, 3) uint8; also of channels first, and of numbers from 0 to 1."""
    image = np.asarray(sent)
    if image.ndim == 3 and image.shape[0] == 3 and image.shape[2] != 3:
        image = image.transpose(1, 2, 0)
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype.kind not in "uf" or 0 in image.shape:
        what = f"{column} has shape {image.shape} and type {image.dtype}"
        raise ValueError(f"{what}; wanted an image (H, W, 3), uint8 or from 0 to 1")
    if image.dtype.kind == "f":
        if not (np.isfinite(image).all() and image.min() >= 0 and image.max() <= 1):
            raise ValueError(f"{column} is {image.dtype} beyond 0 to 1; wanted uint8 or numbers from 0 to 1")
        return np.rint(image * 255).astype(np.uint8)
    if image.dtype != np.uint8:
        raise ValueError(f"{column} is {image.dtype}; wanted uint8")
    return image


def _find(name: str) -> tuple[Path, str | None]:
    """File and scene."""
    if Path(name).is_file():
        return Path(name), None
    stem, colon, scene = name.rpartition(":")
    if not colon:
        stem, scene = name, None
    for path in (Path(stem), PROFILES / f"{stem}.yaml"):
        if path.is_file():
            return path, scene
    shipped = ", ".join(sorted(path.stem for path in PROFILES.glob("*.yaml")))
    raise ValueError(f"profile {name}: neither a file nor one that is shipped ({shipped})")


def _in_scene(file: YamlFile, scene: str | None) -> YamlFile:
    """With the poses that cameras have in ``scene``."""
    content = file.value if isinstance(file.value, dict) else {}
    scenes = content.get("scenes")
    if scenes is None:
        if scene is not None:
            raise ValueError(f"{file.path}: has no scenes; leave :{scene} away")
        return file
    if not isinstance(scenes, dict) or not all(isinstance(poses, dict) for poses in scenes.values()):
        raise ValueError(f"{file.at('scenes')}: scenes is no mapping from scenes to cameras' poses")
    if scene not in scenes:
        given = "none was named" if scene is None else f"there is no {scene!r}"
        raise ValueError(f"{file.path}: {given}; append one of its scenes: {', '.join(f':{name}' for name in scenes)}")
    cameras = dict(content.get("cameras") or {})
    for camera, pose in scenes[scene].items():
        if camera not in cameras:
            raise ValueError(f"{file.at(f'scenes.{scene}.{camera}')}: {camera} is none of the cameras")
        cameras[camera] = {**cameras[camera], "world_from_cam": pose}
    rest = {key: value for key, value in content.items() if key != "scenes"}
    return dataclasses.replace(file, value={**rest, "cameras": cameras})
