"""Scene files and the rules that need no simulator."""

import dataclasses

import numpy as np
import pytest
import scipy.stats
import yaml
from scipy.spatial.transform import Rotation

from examples.control import MAX_TRANSLATION, limit_pose, pose_to_action
from examples.errors import SimulatorError
from examples.headless import select_gl
from examples.pickplace.evaluate import EvaluateConfig
from examples.pickplace.policies import interpolate_trajectory
from examples.pickplace.record import RecordConfig
from examples.pickplace.scene import SCENES_DIR, load_scene
from examples.statistics import wilson_interval


def write_scene(folder, change):
    values = yaml.safe_load((SCENES_DIR / "pickplace.yaml").read_text())
    change(values)
    path = folder / "changed.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def pose(position, rotvec=(0, 0, 0)):
    matrix = np.eye(4)
    matrix[:3, :3] = Rotation.from_rotvec(rotvec).as_matrix()
    matrix[:3, 3] = position
    return matrix


@pytest.mark.parametrize("path", sorted(SCENES_DIR.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_scene_file_loads_and_names_itself(path):
    assert load_scene(path.stem).name == path.stem


def test_every_prompt_of_a_task_names_its_object_and_no_other():
    scene = load_scene("pickplace")
    for task in scene.tasks:
        prompts = scene.prompts(task)
        assert len(set(prompts)) == len(prompts) >= 3
        for prompt in prompts:
            named = {name for name, spec in scene.objects.items() if any(noun in prompt for noun in spec.nouns)}
            assert named == {task.object}


def test_the_settings_of_the_trays_leave_an_object_and_a_container_out_of_the_demonstrations():
    scene = load_scene("trays")
    shown = {(task.object, task.container) for task in scene.tasks}
    objects, containers = {name for name, _ in shown}, {name for _, name in shown}
    tested = {name: {(task.object, task.container) for task in scene.settings[name].tasks} for name in scene.settings}
    assert tested["SO"] == shown == {(name, place) for name in objects for place in containers}
    assert all(name not in objects and place in containers for name, place in tested["UO"] | tested["UOUE"])
    assert all(name in objects and place not in containers for name, place in tested["UC"])
    assert set(scene.objects) - objects and set(scene.containers) - containers


def test_a_setting_changes_tasks_and_looks_and_nothing_else():
    scene = load_scene("trays")
    other = scene.in_setting("UOUE")
    assert other.tasks == scene.settings["UOUE"].tasks and other.background != scene.background
    assert dataclasses.replace(other, tasks=scene.tasks, background=scene.background) == scene
    assert scene.in_setting("UC").background == scene.background
    with pytest.raises(ValueError, match="scene trays has no setting 'XY'; it has SO, UO, UC, UOUE"):
        scene.in_setting("XY")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda v: v.update(settings={"UO": {"tasks": [{"object": "spoon", "container": "dark_bin"}]}}),
            r"settings.UO.tasks\[0\].object: 'spoon' is not among objects",
        ),
        (lambda v: v.update(settings={"UO": {"tasks": []}}), "settings.UO.tasks: is empty"),
        (lambda v: v.update(colour="red"), "has unknown field 'colour'"),
        (lambda v: v.pop("placement"), "lacks field 'placement'"),
        (lambda v: v["objects"]["can"].pop("grasp"), "objects.can: lacks field 'grasp'"),
        (
            lambda v: v["cameras"]["e2h_cam"].update(fovy="wide"),
            "cameras.e2h_cam.fovy: is 'wide'; wanted a finite number",
        ),
        (lambda v: v["cameras"]["e2h_cam"].update(position=[1, 2]), "cameras.e2h_cam.position: .* a list of 3"),
        (lambda v: v["tasks"].append({"object": "cup", "container": "dark_bin"}), r"tasks\[4\].object: 'cup'"),
        (lambda v: v["tasks"].append({"object": "can", "container": "box"}), r"tasks\[4\].container: 'box'"),
        (lambda v: v["instructions"].append("do it"), r"instructions\[3\]: .*must have {object}"),
        (lambda v: v["placement"].update(x=[0.2, 0.1]), "placement.x: .* lower bound first"),
        (lambda v: v["containers"]["dark_bin"].update(drop=[5, 5]), "containers.dark_bin.drop: .* outside"),
        (lambda v: v["objects"]["can"].update(nouns=[]), "objects.can.nouns: is empty"),
        (lambda v: v["robot"].update(stiffness=float("nan")), "robot.stiffness: is nan; wanted a finite number"),
    ],
)
def test_wrong_scene_file_is_refused_by_file_and_key(tmp_path, change, message):
    path = write_scene(tmp_path, change)
    with pytest.raises(ValueError, match=f"changed.yaml.*: .*{message}"):
        load_scene(path)


def test_unknown_scene_name_lists_the_known_ones():
    with pytest.raises(FileNotFoundError, match="scenes here: .*pickplace"):
        load_scene("kitchen")


def test_action_executes_a_reachable_target_exactly():
    now, target = pose([0.1, -0.2, 1.0], [3.0, 0.1, 0.0]), pose([0.12, -0.23, 1.04], [3.0, 0.3, 0.2])
    action = pose_to_action(target, 1.0, now)
    reached = pose(now[:3, 3] + 0.05 * action[:3])
    reached[:3, :3] = Rotation.from_rotvec(0.5 * action[3:6]).as_matrix() @ now[:3, :3]
    np.testing.assert_allclose(reached, target, atol=1e-12)


def test_action_is_clipped_and_gripper_is_only_a_sign():
    action = pose_to_action(pose([1, -1, 0], [0, 0, 2.0]), 0.2, np.eye(4))
    np.testing.assert_allclose(action, [1, -1, 0, 0, 0, 1, 1])
    assert pose_to_action(np.eye(4), 0.9, np.eye(4))[6] == -1


def test_action_refuses_a_target_that_is_not_finite():
    with pytest.raises(ValueError, match="wanted finite numbers"):
        pose_to_action(np.full((4, 4), np.nan), 1.0, np.eye(4))


def test_limited_target_lies_on_the_way_and_is_executed_unclipped():
    now, target = pose([0, 0, 1], [0, 3.0, 0]), pose([0.4, -0.2, 1.3], [0.5, 2.0, 0.9])
    limited = limit_pose(target, now)
    step, way = limited[:3, 3] - now[:3, 3], target[:3, 3] - now[:3, 3]
    assert np.linalg.norm(step) == pytest.approx(MAX_TRANSLATION)
    np.testing.assert_allclose(np.cross(step, way), 0, atol=1e-12)
    assert np.abs(pose_to_action(limited, 1.0, now)[:6]).max() <= 1.0
    np.testing.assert_allclose(limit_pose(limited, now), limited, atol=1e-12)


def test_trajectory_is_met_at_its_times_and_clamped_outside():
    poses = np.stack([pose([0, 0, 0]), pose([1, 0, 0], [0, 0, 1.0]), pose([1, 2, 0], [0, 0, 1.0])])
    openness, times = np.array([1.0, 0.0, 0.0]), np.array([11.0, 13.0, 15.0])
    for i, time in enumerate(times):
        np.testing.assert_allclose(interpolate_trajectory(poses, openness, times, time)[0], poses[i], atol=1e-12)
    between, half_open = interpolate_trajectory(poses, openness, times, 12.0)
    np.testing.assert_allclose(between, pose([0.5, 0, 0], [0, 0, 0.5]), atol=1e-12)
    assert half_open == pytest.approx(0.5)
    np.testing.assert_allclose(interpolate_trajectory(poses, openness, times, 0.0)[0], poses[0], atol=1e-12)
    np.testing.assert_allclose(interpolate_trajectory(poses, openness, times, 99.0)[0], poses[2], atol=1e-12)
    np.testing.assert_allclose(
        interpolate_trajectory(poses[:1], openness[:1], times[:1], 20.0)[0], poses[0], atol=1e-12
    )


@pytest.mark.parametrize(("successes", "trials"), [(0, 10), (7, 10), (10, 10), (19, 40)])
def test_wilson_interval_agrees_with_scipy(successes, trials):
    expected = scipy.stats.binomtest(successes, trials).proportion_ci(0.95, method="wilson")
    np.testing.assert_allclose(wilson_interval(successes, trials), (expected.low, expected.high), atol=1e-6)


def test_headless_gl_respects_the_environment(monkeypatch):
    monkeypatch.setenv("MUJOCO_GL", "egl")
    assert select_gl() == "egl"
    monkeypatch.setenv("MUJOCO_GL", "glfw")
    with pytest.raises(SimulatorError, match="MUJOCO_GL=glfw cannot render without a screen"):
        select_gl()


def test_command_lines_refuse_what_cannot_work(tmp_path):
    with pytest.raises(ValueError, match="--workers is 0"):
        RecordConfig(out=tmp_path, workers=0)
    with pytest.raises(ValueError, match="--policy model needs an existing --ckpt"):
        EvaluateConfig(out=tmp_path)
    with pytest.raises(ValueError, match="--policy replay needs an existing --demos"):
        EvaluateConfig(out=tmp_path, policy="replay", demos=tmp_path / "nowhere")
    assert dataclasses.asdict(EvaluateConfig(out=tmp_path, policy="expert"))["episodes"] == 20
