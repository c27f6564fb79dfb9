"""Run under LIBERO's interpreter: a file in LIBERO's layout with two short demonstrations of a task.

``demo_0`` starts with the object in the basket already and stays successful; ``demo_1`` never gets it there.
"""

import json
import sys

import h5py
import numpy as np

from examples.libero import environment
from examples.libero.tasks import suite_tasks

MOVES = np.array([[0.4, 0.2, 0.3, 0.1, -0.1, 0.2], [-0.3, 0.5, 0.2, 0.0, 0.2, -0.1], [0.2, -0.6, 0.1, 0.2, 0.0, 0.1]])


def actions() -> np.ndarray:
    """(N, 7): motions, then a pause, then closing, then motions with a closed gripper."""
    arm = np.concatenate([MOVES, np.zeros((3, 6)), MOVES])
    return np.column_stack([arm, np.r_[-np.ones(4), np.ones(5)]])  # steps 3 and 5 command nothing


def main(path: str) -> None:
    task = suite_tasks("libero_object")[0]
    with environment.import_simulator().LiberoEnv(task, image_size=None) as env, h5py.File(path, "w") as file:
        data = file.create_group("data")
        data.attrs["bddl_file_name"] = f"chiliocosm/bddl_files/libero_object/{task.name}.bddl"
        data.attrs["problem_info"] = json.dumps({"language_instruction": "put the soup into the basket"})
        for number in range(2):
            env.reset(seed=number)
            env.set_state(task.initial_states()[number])
            inner = env._env
            if number == 0:
                basket = inner.sim.data.get_body_xpos("basket_1_main")
                soup = inner.objects_dict["alphabet_soup_1"].joints[-1]
                inner.sim.data.set_joint_qpos(soup, np.r_[basket + [0, 0, 0.08], 1, 0, 0, 0])
            for _ in range(20):
                env.step(np.r_[np.zeros(6), -1])
            demo = data.create_group(f"demo_{number}")
            demo.attrs["model_file"] = inner.sim.model.get_xml()
            demo["actions"] = actions()
            states, poses = [], []
            for action in actions():
                states.append(env.state)
                poses.append(env.world_from_ee)
                env.step(action)
            demo["states"], demo["poses"] = np.stack(states), np.stack(poses)
            print(number, env.success())


if __name__ == "__main__":
    main(sys.argv[1])
