"""However poses are written down, the same poses come out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from data_utils.convert.mapping import Column, Intrinsics, MappingError, Pose, Values, load_mapping
from data_utils.convert.values import Evaluator
from data_utils.errors import DataError
from data_utils.kinematics.description import read_chain
from data_utils.kinematics.robot import RobotSource

URDF = """<robot name="arm">
  <link name="base"/><link name="upper"/><link name="flange"/><link name="hand"/><link name="finger"/>
  <joint name="turn" type="revolute"><parent link="base"/><child link="upper"/><axis xyz="0 0 1"/>
    <origin xyz="0 0 0.3" rpy="0.1 0 0.2"/><limit lower="-3" upper="3" effort="1" velocity="1"/></joint>
  <joint name="slide" type="prismatic"><parent link="upper"/><child link="flange"/><axis xyz="0 1 0"/>
    <origin xyz="0.2 0 0" rpy="0 0.5 0"/><limit lower="-1" upper="1" effort="1" velocity="1"/></joint>
  <joint name="bolt" type="fixed"><parent link="flange"/><child link="hand"/><origin xyz="0 0 0.1" rpy="1 0 0"/></joint>
  <joint name="grip" type="prismatic"><parent link="hand"/><child link="finger"/><axis xyz="1 0 0"/>
    <limit lower="0" upper="1" effort="1" velocity="1"/></joint>
</robot>"""


class Recording:
    """A recording with one column of numbers."""

    place, index, columns, video_root, fps = "test", 0, ("state",), None, None

    def __init__(self, numbers: np.ndarray) -> None:
        self._numbers, self.length = numbers, len(numbers)

    def numbers(self, column: str) -> np.ndarray:
        return self._numbers

    def frame_size(self, column: str) -> tuple[int, int]:
        return 64, 48


def evaluated(numbers: np.ndarray, mapping: Path = Path("mapping.yaml"), **pose) -> np.ndarray:
    evaluator = Evaluator(Recording(numbers), Path(), mapping)
    return evaluator.pose(Pose(values=Values((Column("state"),)), **pose), "arms[0].pose")


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from(["xyz", "ZYX", "zyx", "XYZ", "zxz"]))
def test_every_notation_gives_the_same_poses(seed, axes):
    rng = np.random.default_rng(seed)
    rotation, xyz = Rotation.random(5, random_state=rng.integers(2**31)), rng.normal(size=(5, 3))
    wanted = np.tile(np.eye(4), (5, 1, 1))
    wanted[:, :3, :3], wanted[:, :3, 3] = rotation.as_matrix(), xyz
    quaternion = rotation.as_quat() * rng.uniform(0.5, 2)  # not every recorder normalises
    written = {
        ("xyz+quat", "xyzw"): (quaternion, {"order": "xyzw"}),
        ("xyz+quat", "wxyz"): (quaternion[:, [3, 0, 1, 2]], {"order": "wxyz"}),
        ("xyz+euler", "degrees"): (rotation.as_euler(axes, degrees=True), {"axes": axes, "angles": "degrees"}),
        ("xyz+euler", "radians"): (rotation.as_euler(axes), {"axes": axes, "angles": "radians"}),
        ("xyz+rotvec", ""): (rotation.as_rotvec(), {}),
        ("xyz+matrix", ""): (rotation.as_matrix().reshape(5, 9), {}),
    }
    for (form, _), (numbers, fields) in written.items():
        poses = evaluated(np.concatenate([xyz, numbers], axis=1), form=form, **fields)
        np.testing.assert_allclose(poses, wanted, atol=1e-9, err_msg=form)
    np.testing.assert_array_equal(evaluated(wanted.reshape(5, 16), form="matrix"), wanted)
    inverse = evaluated(wanted.reshape(5, 16), form="matrix", inverse=True)
    np.testing.assert_allclose(inverse @ wanted, np.broadcast_to(np.eye(4), (5, 4, 4)), atol=1e-9)


def test_joint_positions_become_poses_as_the_urdf_library_sees_them(tmp_path):
    pytest.importorskip("mujoco")
    yourdfpy = pytest.importorskip("yourdfpy")
    path = tmp_path / "arm.urdf"
    path.write_text(URDF)
    numbers = np.random.default_rng(0).uniform(-1, 1, (7, 2))
    told = {
        "description": "arm.urdf",
        "base": "base",
        "end_effector": "hand",
        "joints": ["slide", "turn"],
        "units": "rad",
    }
    poses = evaluated(numbers, tmp_path / "mapping.yaml", form="joints", robot=RobotSource.read(told))
    robot = yourdfpy.URDF.load(str(path), load_meshes=False)
    for row, found in zip(numbers, poses, strict=True):
        robot.update_cfg({"slide": row[0], "turn": row[1], "grip": 0.0})
        np.testing.assert_allclose(found, robot.get_transform("hand", "base"), atol=1e-9)


def test_a_joint_that_moves_and_is_not_recorded_is_named(tmp_path):
    pytest.importorskip("mujoco")
    path = tmp_path / "arm.urdf"
    path.write_text(URDF)
    with pytest.raises(
        DataError, match="joint 'grip' moves 'finger' and is not named; those that do are turn, slide, grip"
    ):
        read_chain(path, ["turn", "slide"], "finger", "base")
    with pytest.raises(DataError, match="no way from 'hand' out to 'upper'"):
        read_chain(path, ["turn"], "upper", "hand")


@pytest.mark.parametrize(
    ("row", "form", "rule", "what"),
    [
        ([0, 0, 0, 0, 0, 0, 0], {"form": "xyz+quat", "order": "xyzw"}, "rotation", "quaternion of length 0"),
        ([0, 0, np.nan, 0, 0, 0, 1], {"form": "xyz+quat", "order": "xyzw"}, "pose", "frame 1 is not finite"),
        ([0, 0, 0, 0, 0, 0, 1], {"form": "matrix"}, "pose", "has 7 numbers; form matrix takes 16"),
    ],
)
def test_poses_that_are_none_are_named_with_their_frame(row, form, rule, what):
    with pytest.raises(DataError, match=what) as error:
        evaluated(np.array([[0, 0, 0, 0, 0, 0, 1], row], np.float64), **form)
    assert error.value.rule == rule


def test_intrinsics_of_a_vertical_field_of_view_are_a_pinhole_in_the_middle():
    K = Evaluator(Recording(np.zeros((2, 1))), Path(), Path()).intrinsics(
        Intrinsics(Values(((90.0,),)), "fovy"), "state", "cameras.front.K"
    )
    np.testing.assert_allclose(K, [[24, 0, 32], [0, 24, 24], [0, 0, 1]])


def test_a_camera_needs_one_way_to_be_placed(tmp_path):
    path = tmp_path / "m.yaml"
    path.write_text(
        "timestamp: timestamp\nprompts: [{task: true}]\n"
        "arms: [{name: arm, pose: {form: matrix, values: state}}]\n"
        "cameras: {front: {frames: f, axes: opencv, K: {form: fovy, values: 45}, on_arm: arm}}\n"
    )
    with pytest.raises(MappingError, match="cameras.front: needs world_from_cam, or on_arm with either"):
        load_mapping(path)
