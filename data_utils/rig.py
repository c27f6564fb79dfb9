"""A camera rig: what calibration found of each camera, in one YAML file that recording, conversion, inspection and
clients read.

Lenses distort; everything else here is a pinhole camera. :meth:`RigCamera.undistort` is the one place where an image
becomes one, before it is recorded, converted or sent to a policy.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np
import yaml

from data_utils.episodes.schema import pose_fault
from data_utils.errors import DataError
from data_utils.files import write_text
from data_utils.geometry.pinhole import Size, intrinsics_fault
from data_utils.yaml_file import Wrong, build, read_yaml

COEFFICIENTS = (0, 4, 5, 8)  # of OpenCV's lens: none; k1 k2 p1 p2; k3 too; k4 k5 k6 too
_DECIMALS = 9  # of what is written: nanometres
_SAME_K = 1e-3  # pixels


@dataclass(frozen=True)
class Residuals:
    """What calibration left over, as root mean squares; None where it has no such number.

    Args:
        px: between what was seen and where it ought to be seen.
        mm: between where the board was seen and where the robot's poses put it.
        deg: likewise.
    """

    px: float | None = None
    mm: float | None = None
    deg: float | None = None

    def __str__(self) -> str:
        units = ((self.px, "px"), (self.mm, "mm"), (self.deg, "degrees"))
        return ", ".join(f"{value:.3g} {unit}" for value, unit in units if value is not None)


@dataclass(frozen=True, eq=False)
class RigCamera:
    """One camera. It stands in the world, or is carried by an arm, or only its lens is known yet.

    Args:
        size: width and height of the images that it takes.
        K: (3, 3) of these.
        distortion: (n,) OpenCV's coefficients k1, k2, p1, p2[, k3[, k4, k5, k6]]; (0,) for none.
        world_from_cam: (4, 4), OpenCV axes; of one that stands.
        on_arm: which of an episode's end-effectors carries it; with ``ee_from_cam``.
        ee_from_cam: (4, 4), OpenCV axes.
        error: of the calibration.
        date: of the calibration.
        method: of the calibration, in words.
        name: for messages.
    Raises:
        ValueError: what is wrong.
    """

    size: tuple[int, int]
    K: np.ndarray
    distortion: np.ndarray = field(default_factory=lambda: np.zeros(0))
    world_from_cam: np.ndarray | None = None
    on_arm: int | None = None
    ee_from_cam: np.ndarray | None = None
    error: Residuals = Residuals()
    date: str = ""
    method: str = ""
    name: str = "the camera"

    def __post_init__(self) -> None:
        if min(self.size) < 1:
            raise ValueError(f"size is {list(self.size)}; wanted [width, height] in pixels")
        if self.K.shape != (3, 3):
            raise ValueError(f"K has shape {self.K.shape}; wanted 3 rows of 3")
        if (fault := intrinsics_fault(self.K[None], self.size[::-1])) is not None:
            raise ValueError(f"K {fault[1]}")
        if self.distortion.shape not in [(n,) for n in COEFFICIENTS]:
            raise ValueError(f"distortion has {self.distortion.size} numbers; wanted 0, 4, 5 or 8, as OpenCV's")
        is_carried = self.ee_from_cam is not None
        if (self.on_arm is not None) != is_carried or (is_carried and self.world_from_cam is not None):
            raise ValueError("wanted world_from_cam, or on_arm with ee_from_cam, or none of them")
        if self.on_arm is not None and self.on_arm < 0:
            raise ValueError(f"on_arm is {self.on_arm}; wanted the number of an end-effector, from 0")
        for name in ("world_from_cam", "ee_from_cam"):
            pose = getattr(self, name)
            if pose is not None and pose.shape != (4, 4):
                raise ValueError(f"{name} has shape {pose.shape}; wanted 4 rows of 4")
            if pose is not None and (fault := pose_fault(pose[None])) is not None:
                raise ValueError(f"{name} {fault[2]}")

    @classmethod
    def read(cls, raw: object) -> RigCamera:
        """Of what the file holds. Raises :class:`data_utils.yaml_file.Wrong`."""
        written = build(_Written, raw)
        values = {item.name: getattr(written, item.name) for item in dataclasses.fields(written)}
        try:
            for name in ("K", "distortion", "world_from_cam", "ee_from_cam"):
                if values[name] is not None:
                    values[name] = np.array(values[name], np.float64)
            return cls(**values | {"date": str(written.date)})
        except ValueError as error:  # rows of unequal length too
            raise Wrong(str(error)) from error

    def written(self) -> dict[str, object]:
        """Inverse of :meth:`read`."""
        values: dict[str, object] = {"size": list(self.size)}
        for name in ("K", "distortion", "world_from_cam", "on_arm", "ee_from_cam"):
            value = getattr(self, name)
            if value is not None:
                values[name] = value if isinstance(value, int) else np.round(value, _DECIMALS).tolist()
        error = {name: round(value, 4) for name, value in dataclasses.asdict(self.error).items() if value is not None}
        return values | {"error": error, "date": self.date, "method": self.method}

    # -- its images -------------------------------------------------------------------------------------------------

    def undistort(self, image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """An image of this camera as a pinhole camera takes it, and that camera's K.

        The view is the widest about the principal point that the image fills. Without distortion the image comes back
        as it is.

        Args:
            image: (H, W, 3) or (H, W) uint8, of the calibrated size or scaled from it.
        Returns:
            the image, of the same size, and K (3, 3).
        Raises:
            DataError: the image is of another shape.
        """
        lens = self._lens(image.shape[:2])
        if lens.maps is None:
            return image, lens.K.copy()
        return cv2.remap(image, *lens.maps, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE), lens.K.copy()

    def pinhole(self, hw: Size) -> np.ndarray:
        """K (3, 3) of undistorted images of ``hw`` (height, width). Raises DataError as :meth:`undistort`."""
        return self._lens(hw).K.copy()

    def is_undistorted(self, K: np.ndarray, hw: Size) -> bool:
        """Whether images of ``hw`` that were recorded with K (3, 3) need no :meth:`undistort` any more."""
        lens = self._lens(hw)
        return lens.maps is None or bool(np.abs(K - lens.K).max() < _SAME_K * max(hw))

    def lens(self, hw: Size, recorded: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """K (3, 3) and distortion (n,) of images of ``hw``: as the camera takes them, or, of an episode that was
        ``recorded`` with a K (3, 3), as they are there. Raises DataError as :meth:`undistort`."""
        if recorded is not None and self.is_undistorted(recorded, hw):
            return self.pinhole(hw), np.zeros(0)
        return self._scaled(hw), self.distortion

    def _lens(self, hw: Size) -> _Lens:
        return _lens(self._scaled(hw).tobytes(), self.distortion.tobytes(), (int(hw[0]), int(hw[1])))

    def _scaled(self, hw: Size) -> np.ndarray:
        """K of distorted images of ``hw``."""
        (width, height), (new_height, new_width) = self.size, hw
        scale = np.array([new_width / width, new_height / height])
        if abs(scale[0] - scale[1]) * max(width, height) > 1:
            what = f"is calibrated at {width} x {height}, the image is {new_width} x {new_height}"
            raise DataError(f"{self.name} {what}; wanted that shape: scaled images will do, cut ones will not", "image")
        return np.diag([*scale, 1.0]) @ self.K

    # -- where it is ------------------------------------------------------------------------------------------------

    def pose(self, world_from_ee: np.ndarray) -> np.ndarray:
        """``world_from_cam``: (4, 4), or (T, 4, 4) where an arm carries it and T poses are given.

        Args:
            world_from_ee: (Nee, 4, 4) or (T, Nee, 4, 4).
        Raises:
            DataError: calibration has not found it yet, or no such arm.
        """
        if self.world_from_cam is not None:
            return self.world_from_cam
        self.check_placed()
        arms = world_from_ee.shape[-3]
        if self.on_arm >= arms:
            raise DataError(f"{self.name} is on arm {self.on_arm}; there are {arms}, counted from 0", "arms")
        return world_from_ee[..., self.on_arm, :, :] @ self.ee_from_cam

    def check_placed(self) -> None:
        """Raise DataError where only the lens is known."""
        if self.world_from_cam is None and self.ee_from_cam is None:
            what = "has no pose yet; python -m data_utils.calibrate fixed (or wrist, or from-robot) finds it"
            raise DataError(f"{self.name} {what}", "camera")


@dataclass(frozen=True)
class _Written:
    """A camera as the file has it."""

    size: tuple[int, int]
    K: tuple[tuple[float, ...], ...]
    distortion: tuple[float, ...] = ()
    world_from_cam: tuple[tuple[float, ...], ...] | None = None
    on_arm: int | None = None
    ee_from_cam: tuple[tuple[float, ...], ...] | None = None
    error: Residuals = Residuals()
    date: object = ""  # YAML makes dates of unquoted ones
    method: str = ""


@dataclass(frozen=True)
class _File:
    cameras: dict[str, RigCamera]


@dataclass(frozen=True)
class Rig:
    """The cameras of a rig by name, and the file that they are from."""

    cameras: Mapping[str, RigCamera]
    path: Path

    def camera(self, name: str) -> RigCamera:
        """Raises DataError where there is no such camera."""
        if name not in self.cameras:
            there = ", ".join(self.cameras) or "none"
            raise DataError(f"{self.path} has no camera {name!r}; it has {there}", "camera")
        return self.cameras[name]

    def frame(self, images: Mapping[str, np.ndarray], world_from_ee: np.ndarray) -> dict[str, dict[str, np.ndarray]]:
        """What ``EpisodeWriter.add_frame`` wants of cameras: ``add_frame(..., **rig.frame(images, world_from_ee))``.

        Args:
            images: camera -> (H, W, 3) uint8 RGB, as it was taken.
            world_from_ee: (Nee, 4, 4) at that moment.
        Returns:
            ``images`` (undistorted), ``world_from_cam`` and ``K``, by camera.
        Raises:
            DataError: a camera that the rig lacks, whose pose is not known, or an image of another shape.
        """
        frame: dict[str, dict[str, np.ndarray]] = {"images": {}, "world_from_cam": {}, "K": {}}
        for name, image in images.items():
            camera = self.camera(name)
            frame["images"][name], frame["K"][name] = camera.undistort(np.asarray(image))
            frame["world_from_cam"][name] = camera.pose(np.asarray(world_from_ee))
        return frame


def read_rig(path: str | os.PathLike) -> Rig:
    """Raises DataError: no such file, or what is wrong in it, with its line."""
    path = Path(path)
    try:
        cameras = read_yaml(path).build(_File).cameras
    except OSError as error:
        what = f"cannot be read ({error.strerror}); python -m data_utils.calibrate makes camera rigs"
        raise DataError(f"{path}: {what}", "file") from error
    except ValueError as error:
        raise DataError(str(error), "schema") from error
    named = {name: dataclasses.replace(camera, name=f"{path}: camera {name}") for name, camera in cameras.items()}
    return Rig(named, path)


def write_rig(path: str | os.PathLike, cameras: Mapping[str, RigCamera]) -> None:
    """The file is there whole or not at all."""
    content = {"cameras": {name: camera.written() for name, camera in cameras.items()}}
    head = "# Cameras, as data_utils.calibrate found them (docs/calibration.md). OpenCV axes, metres, pixels.\n"
    write_text(Path(path), head + yaml.safe_dump(content, sort_keys=False, default_flow_style=None, width=110))


@dataclass(frozen=True)
class _Lens:
    """K (3, 3) of undistorted images, and where in a distorted one each of their pixels is; None: where it is."""

    K: np.ndarray
    maps: tuple[np.ndarray, np.ndarray] | None


@functools.lru_cache(maxsize=32)
def _lens(K_bytes: bytes, distortion_bytes: bytes, hw: Size) -> _Lens:
    """Of float64 arrays' bytes, by which it is kept."""
    K, distortion = np.frombuffer(K_bytes).reshape(3, 3), np.frombuffer(distortion_bytes)
    if not distortion.any():
        return _Lens(K, None)
    new_K = np.diag([*[_zoom(K, distortion, hw)] * 2, 1.0]) @ K
    new_K[:2, 2] = K[:2, 2]
    return _Lens(new_K, cv2.initUndistortRectifyMap(K, distortion, None, new_K, hw[::-1], cv2.CV_16SC2))


def _zoom(K: np.ndarray, distortion: np.ndarray, hw: Size) -> float:
    """The shortest focal length, in those of K, with which every pixel of the undistorted image is in the other.

    It is looked for from long ones down: far outside their image, lenses' polynomials fold back into it.
    """
    height, width = hw
    x, y = np.linspace(0, width - 1, 60), np.linspace(0, height - 1, 60)
    edges = [(x, np.zeros(60)), (x, np.full(60, height - 1.0)), (np.zeros(60), y), (np.full(60, width - 1.0), y)]
    border = (np.concatenate([np.stack(edge, 1) for edge in edges]) - K[:2, 2]) / K[[0, 1], [0, 1]]
    zooms = 3.0 * 0.995 ** np.arange(600)
    for before, zoom in zip(zooms, zooms[1:], strict=False):
        rays = np.hstack([border / zoom, np.ones((len(border), 1))])
        there = cv2.projectPoints(rays, np.zeros(3), np.zeros(3), K, distortion)[0][:, 0]
        if not ((there > -0.5).all() and (there < (width - 0.5, height - 0.5)).all()):
            return float(before)
    return float(zooms[-1])
