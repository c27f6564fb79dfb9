"""LeRobot datasets with joint columns become the episodes of their poses; other units, orders and signs are refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from scipy.spatial.transform import Rotation

from data_utils.convert.lerobot import LerobotConverter, LerobotSettings
from data_utils.episodes import schema
from data_utils.errors import DataError
from data_utils.h5io import EpisodeData
from data_utils.kinematics.recorded import suspicions
from tests.convert import datasets
from tests.convert.test_lerobot_conversion import MAPPING, converted_episode
from tests.kinematics.arms import ARMS, names, robot, smooth

pytest.importorskip("mujoco")
T = 40


def joints_of(count: int, seed: int = 0) -> np.ndarray:
    """(T, n) positions in radians of a motion that a robot may have recorded."""
    lower, upper = limits(count)
    return smooth(lower, upper, T, seed, 0.25)


def limits(count: int) -> tuple[np.ndarray, np.ndarray]:
    return tuple(np.array([joint[2] for joint in ARMS[count]]).T)


def source(folder: Path, state: np.ndarray, action: np.ndarray, state_names: list[str] | None = None) -> Path:
    """One episode with these columns, (T, width) each."""
    videos = {"images.front": datasets.frames(len(state)), "images.hand": datasets.frames(len(state), 1)}
    columns = {"observation.state": state, "action": action, "paraphrase": ["push"] * len(state)}
    root = datasets.write_v21(folder, [datasets.Episode(columns, videos)])
    if state_names is not None:
        path = root / "meta/info.json"
        info = json.loads(path.read_text())
        info["features"]["observation.state"]["names"] = state_names
        path.write_text(json.dumps(info))
    return root


def mapping_of(folder: Path, pose: dict, action: dict, gripper: dict | None = None, told: dict | None = None) -> Path:
    arm = {"name": "arm", "pose": pose, "desired": {"pose": action} | ({"gripper": told} if told else {})}
    content = MAPPING | {"arms": [arm | ({"gripper": gripper} if gripper else {})]}
    content.pop("subtasks")
    path = folder / "mapping.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def converted(folder: Path, state: np.ndarray, action: np.ndarray, settings: dict, state_names=None) -> EpisodeData:
    """What becomes of joint columns by a robot file of these settings."""
    (folder / "arm.yaml").write_text(yaml.safe_dump(settings))
    pose, command = (
        {"form": "joints", "values": column, "robot": "arm.yaml"} for column in ("observation.state", "action")
    )
    return converted_episode(source(folder / "in", state, action, state_names), mapping_of(folder, pose, command), 0)


def settings_of(folder: Path, count: int, units: str = "rad", **more) -> dict:
    robot(folder, count)  # writes its description
    return {"description": f"arm{count}.xml", "end_effector": "tip", "joints": names(count), "units": units} | more


@pytest.mark.parametrize("inline", [False, True])
def test_joint_columns_become_the_episode_of_their_pose_columns(inline, tmp_path):
    """Of an SO-101's columns, in LeRobot's units with the gripper last; and of the poses of the same motion."""
    positions, wider = joints_of(5), np.degrees(np.array(limits(5)).T)
    ranges = [{"name": name, "range": wide} for name, wide in zip(names(5), wider.tolist(), strict=True)]
    gripper = {"column": 5, "closed": 3.0, "open": 97.0}
    told = settings_of(tmp_path, 5, "lerobot", joints=ranges, gripper=gripper)
    arm = robot(tmp_path, 5, units="lerobot", joints=ranges, gripper=gripper)
    openness = np.linspace(0, 1, T)
    state, action = arm.numbers(positions, openness), arm.numbers(np.roll(positions, -1, axis=0), 1 - openness)
    action[-1] = state[-1]

    (tmp_path / "arm.yaml").write_text(yaml.safe_dump(told))
    named = told if inline else "arm.yaml"
    pose, command = ({"form": "joints", "values": column, "robot": named} for column in ("observation.state", "action"))
    root = source(tmp_path / "in", state, action)
    joints = converted_episode(root, mapping_of(tmp_path, pose, command), 0)

    def pose_columns(rows: np.ndarray) -> np.ndarray:
        poses = arm.poses(rows)
        quaternions = Rotation.from_matrix(poses[:, :3, :3]).as_quat()
        return np.concatenate([poses[:, :3, 3], quaternions, rows[:, 5:]], axis=1)

    (tmp_path / "poses").mkdir()
    form = {"form": "xyz+quat", "order": "xyzw"}
    reading = {"closed": 3.0, "open": 97.0}
    mapping = mapping_of(
        tmp_path / "poses",
        form | {"values": "observation.state[0:7]"}, form | {"values": "action[0:7]"},
        reading | {"values": "observation.state[7]"}, reading | {"values": "action[7]"},
    )  # fmt: skip
    root = source(tmp_path / "poses/in", pose_columns(state), pose_columns(action))
    poses = converted_episode(root, mapping, 0)
    for key in ("world_from_ee", "world_from_ee_desired", "gripper", "gripper_desired", "timestamp"):
        np.testing.assert_allclose(getattr(joints, key), getattr(poses, key), atol=1e-6, err_msg=key)
    np.testing.assert_allclose(joints.cameras["hand"].world_from_cam, poses.cameras["hand"].world_from_cam, atol=1e-6)


def refused(folder: Path, state: np.ndarray, settings: dict, action: np.ndarray | None = None) -> str:
    """The message of the conversion of a column that is not what the settings say."""
    with pytest.raises(DataError) as error:
        converted(folder, state, state if action is None else action, settings)
    assert error.value.rule == "pose" and "\n" not in str(error.value)
    return str(error.value)


def test_degrees_that_were_called_radians_are_refused(tmp_path):
    said = refused(tmp_path, np.degrees(joints_of(7)), settings_of(tmp_path, 7))
    assert "beyond its limits" in said and "read as units: deg" in said and "100% of it" in said


def test_radians_that_were_called_degrees_are_refused(tmp_path):
    said = refused(tmp_path, joints_of(7), settings_of(tmp_path, 7, "deg"))
    largest = np.abs(joints_of(7)).max()
    assert f"no joint reads more than {largest:.3g} degrees" in said and "are they radians (units: rad)?" in said


@pytest.mark.parametrize(("units", "says"), [("rad", "units: lerobot they would be within"), ("deg", "units: lerobot")])
def test_lerobots_numbers_that_were_called_angles_are_refused(units, says, tmp_path):
    state = 100 * np.clip(1.3 * np.sin(np.linspace(0, 6, T)[:, None] + np.arange(5)), -1, 1)
    state[:, 2:4] *= 0.9
    assert says in refused(tmp_path, state, settings_of(tmp_path, 5, units))


def test_joints_in_another_order_are_refused_by_the_limits_they_exceed(tmp_path):
    state = joints_of(7)
    state[:, [3, 5]] = state[:, [5, 3]]  # the elbow of a Panda bends one way alone
    said = refused(tmp_path, state, settings_of(tmp_path, 7))
    assert "joint 'joint4' goes to" in said and "'joint6' in its place (another order) it would be within" in said


def test_another_order_than_the_dataset_names_is_refused_before_anything_is_converted(tmp_path):
    called = ["main_joint1", "joint3.pos", "joint2.pos", *names(6)[3:]]
    with pytest.raises(
        DataError, match="joint 1 of column 'observation.state' is 'joint3', as the dataset says, and 'joint2'"
    ):
        converted(tmp_path, joints_of(6), joints_of(6), settings_of(tmp_path, 6), called)


def test_another_sign_is_refused_by_the_limits_it_exceeds(tmp_path):
    state = joints_of(7)
    state[:, 3] *= -1
    said = refused(tmp_path, state, settings_of(tmp_path, 7))
    assert "joint 'joint4' goes to" in said and "; with the other sign" in said


def test_a_path_that_jumps_is_refused_with_its_worst_step(tmp_path):
    state = joints_of(6)
    state[20:30, 1] += 1.9
    said = refused(tmp_path, state, settings_of(tmp_path, 6))
    assert "joint 'joint2' moves by 1." in said and "from frame 29 to 30" in said or "from frame 19 to 20" in said
    assert "rad/s; so fast is 5.1% of the path, and no arm" in said


def test_a_full_turn_is_no_jump_and_a_hand_too_fast_is_one(tmp_path):
    arm, times = robot(tmp_path, 6), np.arange(T) / 10
    state = np.zeros((T, 6))
    state[:, 5] = np.where(np.arange(T) < 20, 3.1, 3.1 - 2 * np.pi)
    assert suspicions(arm, state, times) == []
    swings = np.zeros((T, 6))
    swings[:, 0] = 1.2 * np.arange(T) % 6  # 12 rad/s about the base: joints may, hands do not
    (found,) = suspicions(arm, swings, times)
    assert found.refused and "the end-effector moves at up to" in found.what and "m/s" in found.what


def test_commands_far_from_the_state_are_refused(tmp_path):
    state = joints_of(6)
    differences = np.diff(state, axis=0, append=state[-1:])
    said = refused(tmp_path, state, settings_of(tmp_path, 6), differences)
    assert "from where it is, in the median; are commands in another unit or order, or differences?" in said


def test_a_few_rows_beyond_a_limit_are_remarked_on(tmp_path):
    state = joints_of(6)
    state[:, 2] = np.linspace(3.0, 3.5, T)  # the limit is 3.14; a twentieth of its range is let pass
    remarks = converted(tmp_path, state, state, settings_of(tmp_path, 6)).attributes[schema.REMARKS_ATTR].splitlines()
    said = "arms[0]: joint 'joint3' goes to 3.5 rad (200.5 degrees), 10% of it beyond its limits -3.142 to 3.142 rad"
    assert remarks == [f"pose: {said}", f"pose: {said.replace('arms[0]', 'arms[0].desired')}"]


def test_a_wrong_count_and_a_gripper_given_twice_are_said(tmp_path):
    said = refused(tmp_path, joints_of(7)[:, :5], settings_of(tmp_path, 7))
    assert "arms[0].pose has 5 numbers" in said and "arm.yaml names 7 joints (joint1, joint2" in said
    (tmp_path / "arm.yaml").write_text(
        yaml.safe_dump(settings_of(tmp_path, 6, gripper={"column": 6, "closed": 0, "open": 1}))
    )
    pose = {"form": "joints", "values": "observation.state", "robot": "arm.yaml"}
    gripper = {"values": "observation.state[6]", "closed": 0, "open": 1}
    mapping = mapping_of(tmp_path, pose, pose, gripper)
    with pytest.raises(DataError, match=r"arms\[0\].gripper is given, and .*arm.yaml has a gripper among its numbers"):
        converted_episode(tmp_path / "in", mapping, 0)


def test_a_robot_file_and_its_description_are_what_episodes_are_made_from(tmp_path):
    state, told = joints_of(6), settings_of(tmp_path, 6)
    converted(tmp_path, state, state, told)
    converter = LerobotConverter(LerobotSettings(tmp_path / "in", str(tmp_path / "mapping.yaml")))
    (job,) = converter.jobs()
    before = converter.made_from(job)
    assert {"arm.yaml", "arm6.xml"} <= {Path(name).name for name in before["files"]}
    (tmp_path / "arm.yaml").write_text(yaml.safe_dump(told | {"tcp": [0, 0, 0.05, 0, 0, 0]}))
    assert converter.made_from(job) != before
