"""LIBERO and LIBERO-Plus as vla-eval runs them, with the cameras' calibration in every observation.

LIBERO-Plus moves the fixed camera in some tasks, which no constant tells. Named in the run's YAML file:
``benchmark: "examples.vla_eval.benchmark:CalibratedLIBERO"``.
"""

from __future__ import annotations

from typing import Any

from robosuite.utils import camera_utils
from vla_eval.benchmarks.libero.benchmark import LIBERO_ENV_RESOLUTION, LIBEROBenchmark
from vla_eval.benchmarks.libero_plus.benchmark import LIBEROPlusBenchmark

from examples.vla_eval.observations import CALIBRATION

CAMERAS = {"agentview": "agentview", "eye_in_hand": "robot0_eye_in_hand"}  # our name -> the simulator's


class _Calibrated:
    """MuJoCo's own K and camera poses, in OpenCV's axes, beside what the benchmark sends."""

    def make_obs(self, raw_obs: Any, task: dict[str, Any]) -> dict[str, Any]:
        sim, size = self._env.sim, LIBERO_ENV_RESOLUTION
        known = {
            name: {
                "K": camera_utils.get_camera_intrinsic_matrix(sim, camera, size, size),
                "world_from_cam": camera_utils.get_camera_extrinsic_matrix(sim, camera),
            }
            for name, camera in CAMERAS.items()
        }
        return {**super().make_obs(raw_obs, task), CALIBRATION: known}


class CalibratedLIBERO(_Calibrated, LIBEROBenchmark):
    """Any suite of LIBERO."""


class CalibratedLIBEROPlus(_Calibrated, LIBEROPlusBenchmark):
    """Any suite of LIBERO-Plus, in an environment that has its packages."""
