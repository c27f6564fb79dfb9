"""An episode's cameras as a camera rig has them, in place of what was recorded."""

from __future__ import annotations

import dataclasses

import numpy as np
from scipy.spatial.transform import Rotation

from data_utils.errors import DataError
from data_utils.geometry.camera import CameraFrame
from data_utils.h5io import Episode
from data_utils.rig import Rig


class Calibrated:
    """Frames of an open episode, with the rig's K and poses where it has the camera.

    Raises:
        DataError: the rig has none of the episode's cameras, or no pose of one.
    """

    def __init__(self, episode: Episode, rig: Rig) -> None:
        self._episode, self._rig = episode, rig
        self._both = [name for name in episode.cameras if name in rig.cameras]
        if not self._both:
            what = (
                f"{rig.path} has {', '.join(rig.cameras) or 'no cameras'}, {episode.path} {', '.join(episode.cameras)}"
            )
            raise DataError(f"{what}; wanted a rig with cameras of the episode", "camera")
        for name in self._both:
            rig.camera(name).check_placed()

    def frame(self, camera: str, index: int) -> CameraFrame:
        """Frame ``index``; undistorted, unless it was recorded with the K of undistorted images."""
        recorded = self._episode.camera_frame(camera, index)
        if camera not in self._both:
            return recorded
        calibrated, hw, mask = self._rig.camera(camera), recorded.rgb.shape[:2], recorded.mask
        pose = calibrated.pose(self._episode.world_from_ee[index])
        if calibrated.is_undistorted(recorded.K, hw):
            return dataclasses.replace(recorded, K=calibrated.pinhole(hw), world_from_cam=pose)
        rgb, K = calibrated.undistort(recorded.rgb)
        mask = None if mask is None else calibrated.undistort(mask.astype(np.uint8))[0].astype(bool)
        return CameraFrame(rgb, K, pose, mask)

    def differences(self) -> list[str]:
        """A line per camera: how far what was recorded with the first frame is from the rig."""
        lines = []
        for name in self._both:
            recorded, rig = self._episode.camera_frame(name, 0), self.frame(name, 0)
            mm = 1000 * np.linalg.norm(rig.world_from_cam[:3, 3] - recorded.world_from_cam[:3, 3])
            turned = Rotation.from_matrix(rig.world_from_cam[:3, :3].T @ recorded.world_from_cam[:3, :3])
            focal = rig.K[0, 0] / recorded.K[0, 0] - 1
            apart = f"recorded {mm:.1f} mm and {np.degrees(turned.magnitude()):.2f} degrees from {self._rig.path}"
            lines.append(f"{name}: {apart}; the rig's focal length is {focal:+.2%} longer")
        return lines
