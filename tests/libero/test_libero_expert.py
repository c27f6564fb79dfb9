"""What the scripted expert can do, how it grasps, and that it does it in the simulator."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from examples.errors import SimulatorError
from examples.libero import expert
from examples.libero.environment import ROOT, VENV
from examples.libero.expert import check_goal, inability, missing_parts, named_goal
from examples.libero.grasps import GRASPS, MAX_WIDTH, gripper_down, gripper_towards, rim_grasps, top_grasps
from examples.libero.results import read_results
from examples.libero.tasks import LiberoTask
from tests.libero.test_libero_language import make_tasks

NOTHING = np.zeros((0, 3))
needs_simulator = pytest.mark.skipif(
    not any(VENV.glob("lib/python3*/site-packages/libero/libero/assets/scenes")),
    reason="LIBERO or its assets are not there; run: bash examples/libero/setup.sh",
)


def box(size: tuple[float, float, float], yaw: float = 0.0, centre=(0.0, 0.0, 0.0)) -> np.ndarray:
    """Corners (8, 3)."""
    corners = np.stack(np.meshgrid(*[[-0.5, 0.5]] * 3), axis=-1).reshape(-1, 3) * size
    turn = np.array([[np.cos(yaw), -np.sin(yaw), 0], [np.sin(yaw), np.cos(yaw), 0], [0, 0, 1]])
    return corners @ turn.T + centre


def ring(radius: float, height: float) -> np.ndarray:
    angles = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    circle = np.column_stack([radius * np.cos(angles), radius * np.sin(angles)])
    return np.concatenate([np.column_stack([circle, np.full(48, z)]) for z in (0.0, height)])


# -- what it understands ----------------------------------------------------------------------------------------------


@pytest.fixture
def tasks(tmp_path, monkeypatch) -> list[LiberoTask]:
    made = make_tasks(
        tmp_path,
        put_the_bowl_on_the_plate="(On bowl_1 plate_1)",
        put_the_plate_in_the_basket="(In plate_1 basket_1_inside)",
        open_the_cabinet="(Open cabinet_1_shelf)",
    )
    monkeypatch.setattr(LiberoTask, "fault", None)
    monkeypatch.setattr(expert, "suite_tasks", lambda suite, benchmark: made)
    return made


def test_it_understands_its_task_another_task_and_a_sequence(tasks):
    bowl, plate, _ = (task.problem.goal for task in tasks)
    assert named_goal(tasks[0], "put the bowl on the plate") == bowl
    assert named_goal(tasks[0], "put the plate in the basket") == plate
    words = "put the plate in the basket and then put the bowl on the plate"
    assert named_goal(tasks[0], words) == plate + bowl
    with pytest.raises(SimulatorError, match="the expert does not understand 'sing'"):
        named_goal(tasks[0], "sing")


def test_a_task_that_takes_more_than_its_skills_is_refused_by_name(tasks):
    assert inability(tasks[0], tasks[0].problem.goal) is None
    with pytest.raises(SimulatorError, match="open_the_cabinet: the expert cannot do open cabinet_1_shelf; leave it"):
        check_goal(tasks[2], tasks[2].problem.goal)


class Scene:
    """A scene of which it is known what holds."""

    def __init__(self, task: LiberoTask, *holding: tuple[str, ...]) -> None:
        self.task, self.holding = task, holding

    def holds(self, goal: list[tuple[str, ...]]) -> bool:
        return all(predicate in self.holding for predicate in goal)


def test_a_drawer_is_opened_before_something_is_put_in_and_closed_after_that(tmp_path):
    things = "bowl_1 - bowl"
    (task,) = make_tasks(tmp_path, tidy=(things, "(Close cabinet_1_top_region) (In bowl_1 cabinet_1_top_region)"))
    task.bddl_file.write_text(task.bddl_file.read_text().replace("shelf", "top_region"))
    goal = task.problem.goal
    shut, within, opened = goal[0], goal[1], ("open", "cabinet_1_top_region")
    assert missing_parts(Scene(task, shut), goal) == [opened, within]
    assert missing_parts(Scene(task, opened), goal) == [within, shut]
    assert missing_parts(Scene(task, opened, within), goal) == [shut]
    assert missing_parts(Scene(task, shut, within), goal) == []
    assert inability(task, goal) is None


# -- grasps -----------------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(st.floats(-np.pi, np.pi), st.floats(-0.1, 0.1), st.floats(0.8, 1.2))
def test_a_box_is_grasped_across_its_narrow_side_from_above(yaw, x, z):
    points = box((0.15, 0.04, 0.1), yaw, (x, 0.0, z))
    best = top_grasps(points, NOTHING, np.zeros(3))[0].world_from_ee
    narrow = np.array([-np.sin(yaw), np.cos(yaw)])
    assert abs(best[:2, 0] @ narrow) > np.cos(np.radians(3))
    np.testing.assert_allclose(best[:3, 2], [0, 0, -1])
    np.testing.assert_allclose(best[:2, 3], [x, 0.0], atol=1e-9)
    assert points[:, 2].min() < best[2, 3] < points[:, 2].max()


def test_a_bowl_is_grasped_by_its_rim_with_the_wrist_turned_as_little_as_possible():
    grasps = rim_grasps(ring(0.06, 0.05), NOTHING, np.array([0.0, 0.3, 0.0]))
    at = grasps[0].world_from_ee[:3, 3]
    assert np.linalg.norm(at[:2]) == pytest.approx(0.06)
    np.testing.assert_allclose(at[:2], [0.0, -0.06], atol=1e-6)  # away from the goal
    np.testing.assert_allclose(grasps[0].world_from_ee[:3, 0], [0, 1, 0], atol=1e-6)


def test_a_wall_beside_the_rim_moves_the_grasp_to_another_side():
    wall = box((0.4, 0.02, 0.3), centre=(0.0, -0.09, 0.1))
    wall = np.concatenate([wall, np.column_stack([np.linspace(-0.2, 0.2, 41), np.full(41, -0.09), np.full(41, 0.1)])])
    at = rim_grasps(ring(0.06, 0.05), wall, np.array([0.0, 0.3, 0.0]))[0].world_from_ee[:3, 3]
    assert at[1] > -0.03


def test_the_next_attempt_grasps_elsewhere():
    grasps = rim_grasps(ring(0.06, 0.05), NOTHING, np.zeros(3))
    places = np.array([grasp.world_from_ee[:3, 3] for grasp in grasps])
    assert len(grasps) == GRASPS
    gaps = np.linalg.norm(places[:, None] - places[None], axis=-1) + np.eye(len(places))
    assert gaps.min() > 0.02


def test_what_is_too_wide_to_hold_is_held_by_what_stands_up_in_its_middle():
    pot = np.concatenate(
        [box((0.09, 0.09, 0.13), centre=(0.0, 0.0, 0.065)), box((0.01, 0.012, 0.03), centre=(0.01, 0.0, 0.145))]
    )
    at = top_grasps(pot, NOTHING, np.zeros(3))[0].world_from_ee[:3, 3]
    np.testing.assert_allclose(at[:2], [0.01, 0.0], atol=1e-9)
    assert 0.13 < at[2] < 0.16
    narrow = top_grasps(box((MAX_WIDTH - 0.001, 0.2, 0.1)), NOTHING, np.zeros(3))[0].world_from_ee[:3, 3]
    np.testing.assert_allclose(narrow[:2], [0.0, 0.0], atol=1e-9)


def test_where_the_hand_has_no_room_it_does_not_lie_across():
    bowl, across = ring(0.06, 0.05), np.array([0.0, 1.0])
    closing = rim_grasps(bowl, NOTHING, np.zeros(3), narrow=across)[0].world_from_ee[:2, 0]
    assert abs(closing @ across) < 0.2


angles = st.floats(-np.pi, np.pi)


@given(angles, st.floats(-1.4, 1.4), angles)
def test_a_gripper_points_where_it_is_told_in_the_sense_that_is_the_smaller_turn(heading, pitch, roll):
    approach = np.array([np.cos(pitch) * np.cos(heading), np.cos(pitch) * np.sin(heading), np.sin(pitch)])
    closing = np.cross(approach, [0.0, 0.0, 1.0])
    now = gripper_down(np.zeros(3), np.array([np.cos(roll), np.sin(roll)]))
    pose = gripper_towards(np.ones(3), approach, closing, now)
    np.testing.assert_allclose(pose[:3, :3] @ pose[:3, :3].T, np.eye(3), atol=1e-9)
    np.testing.assert_allclose(pose[:3, 2], approach, atol=1e-9)
    assert np.linalg.det(pose[:3, :3]) == pytest.approx(1.0) and abs(pose[:3, 0] @ closing) > 0
    other = pose[:3, :3] @ np.diag([-1.0, -1.0, 1.0])
    assert np.trace(pose[:3, :3].T @ now[:3, :3]) >= np.trace(other.T @ now[:3, :3])


@given(st.floats(0, 2 * np.pi))
def test_the_gripper_points_down_and_turns_its_wrist_by_at_most_a_quarter(angle):
    pose = gripper_down(np.zeros(3), np.array([np.cos(angle), np.sin(angle)]))
    np.testing.assert_allclose(pose[:3, :3] @ pose[:3, :3].T, np.eye(3), atol=1e-12)
    assert np.linalg.det(pose[:3, :3]) == pytest.approx(1.0) and pose[1, 0] >= 0


# -- in the simulator -------------------------------------------------------------------------------------------------


def evaluate(*flags: str | Path) -> subprocess.CompletedProcess:
    command = (sys.executable, "-m", "examples.libero.evaluate", "--no-video", *map(str, flags))
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.sim
@needs_simulator
def test_the_expert_and_its_recorded_demonstration_succeed_and_chance_fails(tmp_path):
    one = ("--suites", "libero_object", "--begin_task_id", "1", "--no-all", "--num_trials_per_task", "1")
    done = evaluate("--policy", "expert", *one, "--save_root", tmp_path)
    assert "libero_object: 1/1 100.0%" in done.stdout, done.stderr
    done = evaluate("--policy", "random", *one, "--max_steps", "60", "--save_root", tmp_path)
    assert "libero_object: 0/1 0.0%" in done.stdout, done.stderr

    demos = tmp_path / "demos"
    flags = ("--suite", "libero_object", "--tasks", "1", "--episodes", "1", "--image_size", "16", "--out", str(demos))
    command = (sys.executable, "-m", "examples.libero.record", *flags)
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert "1 of 1 episodes recorded, 0 were there already" in done.stdout, done.stderr
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert "0 of 0 episodes recorded, 1 were there already" in again.stdout, again.stderr

    done = evaluate("--policy", "replay", "--demos", demos, "--suites", "libero_object", "--save_root", tmp_path)
    assert "libero_object: 1/1 100.0%" in done.stdout, done.stderr
    rows, record = read_results(tmp_path / "libero_object/replay.csv")
    assert list(rows) == [(1, 0)] and record["settings"]["execute_steps"] == 3


@pytest.mark.slow
@pytest.mark.sim
@needs_simulator
def test_the_expert_grasps_opens_closes_turns_and_slides(tmp_path):
    """A task of every family: a bowl out of an open drawer; a drawer opened and a bowl put in, a plate drawn over the
    table, a stove turned on; a bowl put into a drawer that is closed then."""
    for suite, tasks in (("libero_spatial", "4"), ("libero_goal", "3,5,7"), ("libero_10", "3")):
        given = ("--policy", "expert", "--suites", suite, "--task_ids", tasks, "--num_trials_per_task", "1")
        done = evaluate(*given, "--num_workers", "2", "--save_root", tmp_path)
        count = len(tasks.split(","))
        assert f"{suite}: {count}/{count} 100.0%" in done.stdout, done.stdout + done.stderr
