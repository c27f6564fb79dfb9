"""What MuJoCo says of a scene's cameras and of the arm's state, as openpi's client would have it; run in .venv-libero.

``python tests/libero/mujoco_calibration.py SUITE TASK`` prints one line of JSON.
"""

from __future__ import annotations

import json
import sys

import numpy as np

from examples.libero import environment
from examples.libero.tasks import suite_tasks

SIZE = 64


def main(suite: str, number: str) -> None:
    simulator = environment.import_simulator("libero")
    from robosuite.utils import transform_utils  # decides on its OpenGL when it is imported

    with simulator.LiberoEnv(suite_tasks(suite)[int(number)], SIZE) as env:
        env.reset(0)
        for _ in range(5):
            env.step(np.array([0.5, -0.3, -0.4, 0.2, 0.3, -0.2, -1.0]))
        robot, data = env._env.robots[0], env._sim.data
        hand = transform_utils.convert_quat(data.get_body_xquat(robot.robot_model.eef_name), to="xyzw")
        fingers = [float(data.qpos[index]) for index in robot._ref_gripper_joint_pos_indexes]
        position = data.site_xpos[robot.eef_site_id]
        found = {
            "state": [*position.tolist(), *transform_utils.quat2axisangle(hand).tolist(), *fingers],
            "world_from_ee": env.world_from_ee.tolist(),
            "openness": env.openness,
            "image": env.rgb("agentview").tolist(),
            # As openpi's client turns what MuJoCo renders, whose first row is the bottom one.
            "sent": env._sim.render(camera_name="agentview", height=SIZE, width=SIZE)[::-1, ::-1].tolist(),
            "cameras": {
                name: {"K": env.intrinsics(name).tolist(), "world_from_cam": env.world_from_cam(name).tolist()}
                for name in env.cameras
            },
        }
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
