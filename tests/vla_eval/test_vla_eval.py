"""A policy under vla-eval: what its benchmarks send becomes frames, and the real harness is answered."""

from __future__ import annotations

import asyncio
import dataclasses
import json

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from apt.checkpoint import write_config
from apt.infer.frames import parse_frame
from apt.infer.openpi_profile import ProfileReader
from data_utils.datasets import DATASETS
from examples.vla_eval.observations import absolute_rows, frame_of, libero_scene
from tests.infer.helpers import tiny_policy
from train_utils.saving import save_checkpoint

SIZE = 256
CONFIG = DATASETS["LiberoObject"].config  # whose cameras the profiles below have
TASK = {"suite": "libero_object", "task_id": 3, "episode_idx": 0, "name": "pick up the milk"}
# RoboCasa's state is in the frame of the robot's base, and its images are upright.
ROBOCASA = """
arms:
  - name: arm
    pose: {form: xyz+quat, order: xyzw, values: "states[0:7]"}
    gripper: {values: "states[7]", closed: 0.0, open: 0.04}
cameras:
  agentview:
    frames: images/robot0_agentview_left
    K: {form: fovy, values: [60.0]}
    axes: opengl
    world_from_cam: {form: xyz+quat, order: wxyz, values: [0.1, 0.4, 1.2, 1, 0, 0, 0]}
  eye_in_hand:
    frames: images/robot0_eye_in_hand
    K: {form: fovy, values: [75.0]}
    axes: opencv
    on_arm: arm
    ee_from_cam: {form: xyz+quat, order: wxyz, values: [0.05, 0, -0.1, 1, 0, 0, 0]}
actions: {kind: deltas, translation: 0.05, rotation: 0.5}
"""
# SimplerEnv sends one camera, and the tip's pose in the world with the quaternion's w first.
SIMPLER = """
arms:
  - name: arm
    pose: {form: xyz+quat, order: wxyz, values: "tcp_pose[0:7]"}
    gripper: {values: "states[7]", closed: 0.0, open: 1.0}
cameras:
  agentview:
    frames: images/primary
    K: {form: fx+fy+cx+cy, values: [623.6, 623.6, 320, 256], size: [640, 512]}
    axes: opencv
    world_from_cam: {form: xyz+quat, order: wxyz, values: [0, 0.3, 1.1, 0, 1, 0, 0]}
actions: {kind: deltas, translation: 1.0, rotation: 1.0}
"""


def libero_observation(rng: np.random.Generator) -> dict:
    """As the harness's LIBERO sends it to this server."""
    turn = Rotation.from_euler("xyz", [np.pi, 0.1, 0.2]).as_rotvec()
    return {
        "images": {name: rng.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8) for name in ("agentview", "wrist")},
        "states": np.array([0.1, -0.05, 0.3, *turn, 0.03, -0.03]),
        "controller_states": np.zeros(8),
        "task_description": "pick up the milk and place it in the basket",
    }


def test_liberos_cameras_stand_where_the_suite_and_the_task_say():
    scenes = [libero_scene(suite, task) for suite, task in (("libero_goal_swap", 3), ("libero_object", 9))]
    assert scenes == ["tabletop", "floor"]
    assert [libero_scene("libero_10", task) for task in (0, 2, 5)] == ["living_room", "tabletop", "study"]
    with pytest.raises(ValueError, match="where the camera of the suite 'libero_90' stands is not known"):
        libero_scene("libero_90", 0)


def test_liberos_images_are_turned_back_and_frames_count_control_steps():
    observation = libero_observation(np.random.default_rng(0))
    frame = frame_of(observation, ProfileReader("libero:floor"), step=12)
    np.testing.assert_array_equal(frame["agentview"]["data"]["color"], observation["images"]["agentview"][:, ::-1])
    assert frame["timestamp"] == 12.0 and frame["gripper"][0] == pytest.approx(0.75)
    assert frame["agentview"]["camera"]["K"][0, 0] == pytest.approx(309.0193, abs=1e-3)
    parse_frame(frame, CONFIG)


def test_what_the_benchmark_says_of_its_cameras_comes_before_constants():
    K, pose = np.diag([200.0, 200.0, 1.0]) + [[0, 0, 128.0], [0, 0, 128.0], [0, 0, 0]], np.eye(4)
    observation = libero_observation(np.random.default_rng(0))
    observation["calibration"] = {"agentview": {"K": K, "world_from_cam": pose}}
    frame = frame_of(observation, ProfileReader("libero:floor"), 0)
    np.testing.assert_array_equal(frame["agentview"]["camera"]["K"], K)
    np.testing.assert_array_equal(frame["agentview"]["data"]["wcT"], pose)
    assert frame["eye_in_hand"]["camera"]["K"][0, 0] == pytest.approx(166.8128, abs=1e-3)
    observation["calibration"] = {"front": {"K": K, "world_from_cam": pose}}
    with pytest.raises(ValueError, match="calibration is of 'front'; the profile's cameras are agentview, eye_in_hand"):
        frame_of(observation, ProfileReader("libero:floor"), 0)


def test_robocasas_and_simplerenvs_observations_are_told_by_profiles(tmp_path):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
    (tmp_path / "robocasa.yaml").write_text(ROBOCASA)
    turn = Rotation.from_euler("z", 0.4)
    observation = {
        "images": {"robot0_agentview_left": image, "robot0_eye_in_hand": image},
        "states": np.array([0.3, 0.1, 0.8, *turn.as_quat(), 0.02, -0.02]),
        "task_description": "open the drawer",
    }
    reader = ProfileReader(str(tmp_path / "robocasa.yaml"))
    frame = frame_of(observation, reader, 0)
    parse_frame(frame, CONFIG)
    np.testing.assert_allclose(frame["ee_pose"][0, :3, :3], turn.as_matrix(), atol=1e-9)
    np.testing.assert_array_equal(frame["agentview"]["data"]["color"], image)
    ahead = np.array(frame["ee_pose"])
    ahead[0, 0, 3] += 0.025
    np.testing.assert_allclose(
        reader.deltas(frame["ee_pose"][0], ahead, np.ones(1)), [[0.5, 0, 0, 0, 0, 0, -1]], atol=1e-6
    )

    (tmp_path / "simpler.yaml").write_text(SIMPLER)
    observation = {
        "images": {"primary": rng.integers(0, 256, (512, 640, 3), dtype=np.uint8)},
        "tcp_pose": np.array([0.3, 0.1, 0.8, *turn.as_quat()[[3, 0, 1, 2]]]),
        "states": np.array([0, 0, 0, 1, 0, 0, 0, 0.6]),
        "task_description": "pick coke can",
    }
    frame = frame_of(observation, ProfileReader(str(tmp_path / "simpler.yaml")), 0)
    one = dataclasses.replace(CONFIG, cameras=("agentview",), wrist_cameras=(), ee_ref_cams=(("agentview",),))
    parse_frame(frame, one)
    np.testing.assert_allclose(frame["ee_pose"][0, :3, :3], turn.as_matrix(), atol=1e-9)
    assert frame["gripper"][0] == pytest.approx(0.6)


def test_rows_are_absolute_poses_and_the_grippers_side():
    poses = np.tile(np.eye(4), (2, 1, 1))
    poses[1, :3, :3] = Rotation.from_rotvec([0, 0, 0.3]).as_matrix()
    poses[:, 0, 3] = 0.1, 0.2
    np.testing.assert_allclose(
        absolute_rows(poses, np.array([0.9, 0.1])), [[0.1, 0, 0, 0, 0, 0, -1], [0.2, 0, 0, 0, 0, 0.3, 1]], atol=1e-6
    )


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder, policy = tmp_path_factory.mktemp("policy"), tiny_policy()
    config = dataclasses.replace(policy.train_config, dataset_classes=("LiberoObject",))
    save_checkpoint({"weights": policy.model.released_weights(), "current_iters": 1}, folder / "ckpt_latest.pt")
    write_config(folder, json.loads(json.dumps(config.to_dict())))
    return folder / "ckpt_latest.pt"


async def episode(url: str, task: dict, observations: list[dict]) -> list:
    """What the server answers to an episode's observations; texts for errors."""
    from vla_eval.connection import Connection
    from vla_eval.protocol.messages import MessageType

    connection = Connection(url)
    await connection.connect(benchmark="LIBEROBenchmark")
    answers = [connection.server_info]
    try:
        await connection.send(MessageType.EPISODE_START, {"task": task})
        for observation in observations:
            await connection.send(MessageType.OBSERVATION, observation)
            answer = await connection.recv(timeout=120)
            answers.append(answer.payload.get("error", answer.payload.get("actions")))
    finally:
        await connection.close()
    return answers


def test_the_real_harness_is_answered_and_an_episode_depends_on_its_number_alone(checkpoint):
    vla_eval = pytest.importorskip("vla_eval", reason="vla-eval is not installed; run: pip install vla-eval")
    from examples.vla_eval.server import AptModelServer

    rng = np.random.default_rng(0)
    seen = [libero_observation(rng) for _ in range(6)]
    server = AptModelServer(ckpt=str(checkpoint), steps=2, device="cpu", execute_steps=4, max_batch_size=2)
    handle = vla_eval.serve_background(server)
    try:
        url = f"ws://127.0.0.1:{handle.port}"

        async def both() -> list:
            return await asyncio.gather(episode(url, TASK, seen), episode(url, TASK, seen))

        first, same = asyncio.run(both())
        other = asyncio.run(episode(url, TASK | {"episode_idx": 1}, seen))
        refused = asyncio.run(episode(url, TASK, [{**seen[0], "images": {"agentview": seen[0]["images"]["wrist"]}}]))
        unknown = asyncio.run(episode(url, TASK | {"suite": "libero_90"}, seen[:1]))
    finally:
        handle.close()
    rows, again, others = (np.array(answers[1:]) for answers in (first, same, other))
    assert rows.shape == (6, 7) and set(rows[:, 6]) <= {-1.0, 1.0}
    np.testing.assert_allclose(rows, again, atol=1e-4)
    assert not np.allclose(rows, others, atol=1e-4)
    assert "observation/wrist_image" in refused[1] and "libero_90" in unknown[1]
