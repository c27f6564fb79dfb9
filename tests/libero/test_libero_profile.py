"""The constants of the openpi profile for LIBERO are those of the simulator, scene by scene."""

from __future__ import annotations

import json
import os
import subprocess

import numpy as np
import pytest

from apt.infer.openpi_profile import ProfileReader
from examples.libero.environment import ROOT, VENV
from tests.libero.test_libero_expert import needs_simulator

SCENES = {
    "tabletop": (("libero_goal", "0"), ("libero_10", "2")),
    "floor": (("libero_object", "3"),),
    "living_room": (("libero_10", "0"),),
    "study": (("libero_10", "5"),),
}


def measured(suite: str, task: str) -> dict:
    command = [str(VENV / "bin/python"), "tests/libero/mujoco_calibration.py", suite, task]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.sim
@needs_simulator
@pytest.mark.parametrize("scene", SCENES)
def test_a_scenes_constants_are_mujocos_own(scene):
    for suite, task in SCENES[scene]:
        truth = measured(suite, task)
        sent = np.array(truth["sent"], np.uint8)
        seen = {"observation/image": sent, "observation/wrist_image": sent, "observation/state": truth["state"]}
        frame = ProfileReader(f"libero:{scene}").frame({**seen, "prompt": "x"})
        np.testing.assert_allclose(frame["ee_pose"][0], truth["world_from_ee"], atol=1e-4)
        assert frame["gripper"][0] == pytest.approx(truth["openness"], abs=1e-6)
        for name, camera in truth["cameras"].items():
            np.testing.assert_allclose(frame[name]["camera"]["K"], camera["K"], atol=1e-3)
            np.testing.assert_allclose(frame[name]["data"]["wcT"], camera["world_from_cam"], atol=1e-4)
        assert np.ptp(sent) > 50
        np.testing.assert_array_equal(frame["agentview"]["data"]["color"], truth["image"])
