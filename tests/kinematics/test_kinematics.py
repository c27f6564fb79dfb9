"""Joints to poses as MuJoCo has them, poses to joints along paths, and robot files that cannot be used."""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from data_utils.errors import DataError
from data_utils.kinematics.description import read_chain
from data_utils.kinematics.inverse import Tolerance, errors, follow
from data_utils.kinematics.robot import RobotSource, load_robot
from tests.kinematics.arms import names, robot, smooth, write_arm

mujoco = pytest.importorskip("mujoco")


def mujocos_poses(path, site: str, joints: list[str], positions: np.ndarray) -> np.ndarray:
    """(T, 4, 4) of a site in the world."""
    description = mujoco.MjSpec.from_file(str(path))
    for part in [*description.geoms, *description.meshes]:
        part.delete()
    description.compiler.boundmass = description.compiler.boundinertia = 1.0
    model = description.compile()
    data, poses = mujoco.MjData(model), np.tile(np.eye(4), (len(positions), 1, 1))
    for row, position in enumerate(positions):
        for name, value in zip(joints, position, strict=True):
            data.joint(name).qpos = value
        mujoco.mj_kinematics(model, data)
        poses[row, :3, :3], poses[row, :3, 3] = data.site(site).xmat.reshape(3, 3), data.site(site).xpos
    return poses


# -- joints to poses --------------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(count=st.sampled_from([5, 6, 7]), strange=st.booleans(), seed=st.integers(0, 2**31))
def test_poses_are_those_of_mujocos_sites(count, strange, seed, tmp_path_factory):
    path = write_arm(tmp_path_factory.mktemp("arm") / "arm.xml", count, strange)
    joints = names(count) + ["slide"] * strange
    np.random.default_rng(seed).shuffle(joints)  # of columns, in which they need not be in series
    chain = read_chain(path, joints, "tip")
    positions = np.random.default_rng(seed).uniform(chain.lower, chain.upper, (20, len(chain)))
    wanted = mujocos_poses(path, "tip", joints, positions)
    np.testing.assert_allclose(chain.poses(positions), wanted, atol=1e-9)
    for position, pose in zip(positions, wanted, strict=True):
        np.testing.assert_allclose(chain.pose_and_jacobian(position)[0], pose, atol=1e-9)


@pytest.mark.parametrize("strange", [False, True])
def test_the_jacobian_is_how_the_pose_changes(strange, tmp_path):
    chain = read_chain(write_arm(tmp_path / "arm.xml", 7, strange), names(7) + ["slide"] * strange, "tip")
    position = np.random.default_rng(1).uniform(chain.lower, chain.upper)
    pose, jacobian = chain.pose_and_jacobian(position)
    for joint, small in enumerate(1e-6 * np.eye(len(chain))):
        after, before = chain.poses(np.stack([position + small, position - small]))
        rate = (after - before) / 2e-6
        spin = rate[:3, :3] @ pose[:3, :3].T
        np.testing.assert_allclose(jacobian[:3, joint], rate[:3, 3], atol=1e-7)
        np.testing.assert_allclose(jacobian[3:, joint], [spin[2, 1], spin[0, 2], spin[1, 0]], atol=1e-7)


def test_rows_are_the_same_alone_and_in_a_long_column(tmp_path):
    arm = robot(tmp_path, 7).chain
    positions = np.random.default_rng(0).uniform(arm.lower, arm.upper, (5000, 7))
    np.testing.assert_allclose(
        arm.poses(positions)[[0, 2047, 2048, 4999]], arm.poses(positions[[0, 2047, 2048, 4999]]), atol=1e-12
    )


def test_a_base_and_a_tool_move_the_frames(tmp_path):
    whole, tool = robot(tmp_path, 6), [0, 0, 0.1, 0, 0, 0.5]
    from_link = robot(tmp_path, 6, base="link1", joints=names(6)[1:], tcp=tool)
    positions = np.random.default_rng(0).uniform(-1, 1, (4, 6))
    base_from_link = read_chain(tmp_path / "arm6.xml", ["joint1"], "link1").poses(positions[:, :1])
    found = base_from_link @ from_link.poses(positions[:, 1:])
    np.testing.assert_allclose(found[:, :3, 3], (whole.poses(positions) @ [0, 0, 0.1, 1])[:, :3], atol=1e-12)


def test_numbers_in_every_unit_are_the_same_positions_and_come_back(tmp_path):
    joints = [
        {"name": name, "sign": sign, "offset": 10.0} for name, sign in zip(names(5), (1, -1, 1, 1, -1), strict=True)
    ]
    degrees = robot(tmp_path, 5, joints=joints, units="deg", gripper={"column": 2, "closed": 5, "open": 95})
    row = degrees.numbers(np.radians([[10.0, 20, 30, 40, 50]]), np.array([0.5]))
    np.testing.assert_allclose(row, [[0, -10, 50, 20, 30, -40]], atol=1e-12)
    np.testing.assert_allclose(np.degrees(degrees.positions(row)), [[10, 20, 30, 40, 50]])
    ranges = [{"name": name, "range": [-50, 150]} for name in names(5)]
    lerobot = robot(tmp_path, 5, joints=ranges, units="lerobot")
    np.testing.assert_allclose(
        np.degrees(lerobot.positions(np.array([[-100.0, 0, 100, 50, -50]]))), [[-50, 50, 150, 100, 0]], atol=1e-9
    )


# -- poses to joints --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [5, 6, 7])
def test_recorded_paths_are_followed_without_jumps(count, tmp_path):
    chain = robot(tmp_path, count).chain
    for seed in range(4):
        recorded = smooth(chain.lower, chain.upper, 120, seed, 0.3)
        poses = chain.poses(recorded)
        found = follow(chain, poses, recorded[0])
        assert found.reached.all(), found.text()
        far, turned = errors(chain.poses(found.positions), poses)
        assert far.max() < 1e-3 and np.degrees(turned).max() < 0.2
        assert (found.positions >= chain.lower).all() and (found.positions <= chain.upper).all()
        assert np.abs(np.diff(found.positions, axis=0)).max() < 0.4  # as recorded: at most 0.2


@pytest.mark.parametrize("count", [5, 6, 7])
def test_a_path_along_a_joints_limit_is_followed_within_it(count, tmp_path):
    chain = robot(tmp_path, count).chain
    recorded = smooth(chain.lower, chain.upper, 60, 1, 0.2)
    recorded[:, 1] = chain.upper[1] - 0.02 * (1 + np.cos(np.linspace(0, 9, 60)))  # touches it thrice
    found = follow(chain, chain.poses(recorded), recorded[0])
    assert found.reached.all(), found.text()
    assert (found.positions <= chain.upper).all() and (found.positions >= chain.lower).all()


def test_a_start_is_found_where_none_is_given(tmp_path):
    for count in (5, 6, 7):
        chain = robot(tmp_path, count).chain
        recorded = smooth(chain.lower, chain.upper, 10, 3, 0.3)
        assert follow(chain, chain.poses(recorded)).reached[0]


def test_poses_out_of_reach_are_said_and_the_hand_stays_as_near_as_it_can(tmp_path):
    chain = robot(tmp_path, 6).chain
    inside = chain.poses(np.array([[0.3, -1.2, 1.4, -0.5, -1.3, 0.2]]))[0]
    path = np.tile(inside, (40, 1, 1))
    path[:, :3, 3] += np.linspace(0, 1, 40)[:, None] * inside[:3, 3] / np.linalg.norm(inside[:3, 3]) * 1.5
    found = follow(chain, path, np.array([0.3, -1.2, 1.4, -0.5, -1.3, 0.2]))
    first = int(np.argmin(found.reached))
    assert 0 < first < 40 and not found.reached[first:].any()
    assert (np.diff(found.position_error[20:]) > 0).all() and (found.position_error[:first] < 1e-3).all()
    assert np.abs(np.diff(found.positions, axis=0)).max() <= 0.5 + 1e-12
    said = f"{first} of 40 poses reached, at most {1e3 * found.position_error.max():.3g} mm off (row 39)"
    assert found.text().startswith(said)


def test_five_joints_meet_the_position_first_and_say_how_far_the_orientation_is_off(tmp_path):
    chain = robot(tmp_path, 5).chain
    recorded = smooth(chain.lower, chain.upper, 60, 2, 0.3)
    poses = chain.poses(recorded)
    tilt = np.radians(10)
    sideways = np.eye(4)
    sideways[:3, :3] = [[1, 0, 0], [0, np.cos(tilt), -np.sin(tilt)], [0, np.sin(tilt), np.cos(tilt)]]
    found = follow(chain, poses @ sideways, recorded[0])
    assert not found.reached.all() and found.position_error.max() < 1e-3
    assert np.degrees(found.rotation_error.max()) < 11  # no further than staying on the recorded path is
    assert follow(chain, poses @ sideways, recorded[0], Tolerance(rotation=np.inf)).reached.all()


def test_a_pose_far_away_is_gone_to_in_steps_and_not_jumped_to(tmp_path):
    chain = robot(tmp_path, 6).chain
    here, there = np.array([0.3, -1.2, 1.4, -0.5, -1.3, 0.2]), np.array([1.8, -1.2, 1.4, -0.5, -1.3, 0.2])
    found = follow(chain, np.repeat(chain.poses(there[None]), 6, axis=0), here)
    assert not found.reached[0] and found.reached[-1]
    assert np.abs(np.diff(np.vstack([here, found.positions]), axis=0)).max() <= 0.5 + 1e-12


def test_what_is_no_path_is_refused(tmp_path):
    chain = robot(tmp_path, 6).chain
    with pytest.raises(ValueError, match=r"wanted \(T, 4, 4\)"):
        follow(chain, np.eye(4))
    with pytest.raises(ValueError, match="row 1 is no rigid transform"):
        follow(chain, np.stack([np.eye(4), np.diag([1.1, 1, 1, 1])]))
    with pytest.raises(ValueError, match=r"start is \(5,\).*wanted \(6,\)"):
        follow(chain, np.eye(4)[None], np.zeros(5))


# -- robot files ------------------------------------------------------------------------------------------------------

GOOD = """description: arm6.xml
end_effector: tip
joints: [joint1, joint2, joint3, joint4, joint5, joint6]
units: rad
"""


@pytest.mark.parametrize(("change", "said"), [
    (("joint3", "elbow"), "joint 'elbow' is not in arm6.xml; it has joint1, joint2, joint3"),
    (("joint3, ", ""), "joint 'joint3' moves 'tip' and is not named"),
    (("joint3", "joint2"), "joint 'joint2' is named twice"),
    (("tip", "hand"), "no site or body 'hand' in arm6.xml; it has sites tip; bodies world, base, link1"),
    (("tip", "link3"), "joint 'joint4' does not move 'link3'; leave it out"),
    (("units: rad", "units: rad\nbase: foot"), "no body 'foot' in arm6.xml"),
    (("units: rad", "units: rad\nbase: link6\n"), "joint 'joint1' does not move 'tip'; leave it out, .*: none do"),
    (("units: rad", "units: turns"), "units is 'turns'; wanted rad, deg, lerobot"),
    (("units: rad", "units: lerobot"), r"line 3: joints: joint 'joint1' has no range"),
    (("joint3", "{name: joint3, range: [-1, 1]}"), "joint 'joint3' has a range, which only units lerobot want"),
    (("joint3", "{name: joint3, sign: 2}"), r"line 3: joints\[2\]: sign is 2; wanted 1 or -1"),
    (("units: rad", "units: rad\ntcp: [0, 0, 0.1]"), "tcp has 3 numbers"),
    (("units: rad", "units: rad\ngripper: {column: 7, closed: 0, open: 1}"), "gripper.column is 7; wanted 0 to 6"),
    (("arm6.xml", "arm9.xml"), "description is arm9.xml, which is not beside it"),
    (("arm6.xml", "bad.xml"), "bad.xml: cannot be read as MJCF or URDF"),
    (("arm6.xml", "../x y"), "wanted a file .* or a name of robot_descriptions"),
    (("units: rad", "unit: rad"), "line 4: has unknown field 'unit'"),
])  # fmt: skip
@pytest.mark.parametrize("inline", [False, True])
def test_a_robot_that_cannot_be_used_is_refused_in_one_line(change, said, inline, tmp_path):
    write_arm(tmp_path / "arm6.xml", 6)
    (tmp_path / "bad.xml").write_text("<mujoco><worldbody>")
    text = GOOD.replace(*change)
    (tmp_path / "arm.yaml").write_text(text)
    with pytest.raises(
        ValueError, match=said if not inline else said.removeprefix("line 3: ").removeprefix("line 4: ")
    ) as error:
        if inline:
            RobotSource.read(yaml.safe_load(text)).open(tmp_path / "mapping.yaml")
        else:
            load_robot(tmp_path / "arm.yaml")
    assert "\n" not in str(error.value)
    assert inline or "arm.yaml" in str(error.value)


def test_a_robot_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(DataError, match="arm.yaml: no such robot file"):
        load_robot(tmp_path / "arm.yaml")


def test_a_name_that_no_collection_knows_is_said_without_fetching_anything(tmp_path):
    pytest.importorskip("robot_descriptions")
    with pytest.raises(DataError, match="'no_such_arm', which robot_descriptions does not know"):
        robot(tmp_path, 6, description="no_such_arm")


def test_a_robot_file_that_changed_is_read_again(tmp_path):
    write_arm(tmp_path / "arm6.xml", 6)
    path = tmp_path / "arm.yaml"
    path.write_text(GOOD)
    assert load_robot(path) is load_robot(path)
    path.write_text(GOOD.replace("rad", "deg"))
    os.utime(path, ns=(1, 1))
    assert load_robot(path).settings.units == "deg"


# -- the document -----------------------------------------------------------------------------------------------------


def test_the_robot_file_and_the_program_of_the_document_work(tmp_path, monkeypatch):
    text = (
        (Path(__file__).parents[2] / "docs/convert.md")
        .read_text(encoding="utf-8")
        .split("## Joints instead of poses")[1]
    )
    arm = write_arm(tmp_path / "so101.xml", 5).read_text().replace('"tip"', '"gripperframe"')
    for ours, theirs in zip(
        names(5), ("shoulder_pan", "shoulder_lift", "elbow_flex", "wrist_flex", "wrist_roll"), strict=True
    ):
        arm = arm.replace(f'"{ours}"', f'"{theirs}"')
    (tmp_path / "so101.xml").write_text(arm)
    (tmp_path / "so101.yaml").write_text(re.search(r"```yaml\n(.*?)```", text, re.DOTALL)[1])
    monkeypatch.chdir(tmp_path)
    state = np.array([10.0, -20, 30, -5, 40, 60])
    base_from_ee = load_robot(Path("so101.yaml")).poses(state + np.linspace(0, 5, 8)[:, None])
    here = {"state": state, "base_from_ee": base_from_ee, "openness": np.full(8, 0.25)}
    exec(re.search(r"```python\n(.*?)```", text, re.DOTALL)[1], here)
    np.testing.assert_allclose(here["commands"][:, :5], state[:5] + np.linspace(0, 5, 8)[:, None], atol=0.05)
    np.testing.assert_allclose(here["commands"][:, 5], 25)
