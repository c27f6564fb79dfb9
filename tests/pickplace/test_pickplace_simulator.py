"""The simulator, the expert, recording and closed-loop evaluation, all real."""

import dataclasses
import importlib.util
import json

import cv2
import numpy as np
import pytest

from data_utils.geometry.camera import project
from data_utils.h5io import Episode
from examples.control import pose_to_action
from examples.disturbance import Disturbance
from examples.pickplace.env import PickPlaceEnv
from examples.pickplace.evaluate import EVALUATION_STREAM, EvaluateConfig, evaluate
from examples.pickplace.expert import ScriptedExpert
from examples.pickplace.policies import ModelPolicy, RandomPolicy, ReplayPolicy
from examples.pickplace.record import RecordConfig, read_dataset, record, record_episode
from examples.pickplace.rollout import run_episode
from examples.pickplace.scene import Task, load_scene

pytestmark = [
    pytest.mark.sim,
    # Looked up, not imported: robosuite settles on an OpenGL when it is imported.
    pytest.mark.skipif(importlib.util.find_spec("robosuite") is None, reason="the simulator is not installed"),
]

SIZE = 128


@pytest.fixture(scope="module")
def env():
    with PickPlaceEnv("pickplace", image_size=SIZE) as env:
        yield env


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Two recorded episodes and the settings they were recorded with."""
    config = RecordConfig(tmp_path_factory.mktemp("demos"), episodes=2, workers=2, image_size=64)
    record(config)
    return config


def object_geoms(env, name):
    model = env.sim.mj_model
    return np.flatnonzero(model.geom_bodyid == model.body(env.sim.objects[name].root_body).id)


def box_corners(env, name):
    low, high = env.object_box(name)
    unit = np.stack(np.meshgrid([0, 1], [0, 1], [0, 1]), axis=-1).reshape(8, 3)
    pose = env.world_from_object(name)
    return (low + unit * (high - low)) @ pose[:3, :3].T + pose[:3, 3]


def test_objects_are_seen_where_their_poses_project(env):
    seen = {camera: 0 for camera in env.scene.cameras}
    for seed in range(4):
        env.reset(seed)
        for camera in env.scene.cameras:
            segmentation = env.renderer.segmentation(camera)
            for name in env.scene.objects:
                rows, columns = np.nonzero(np.isin(segmentation, object_geoms(env, name)))
                inside = min(columns.min(initial=0), rows.min(initial=0)) >= 0 and len(rows) > 20
                if not inside or {0, SIZE - 1} & {*rows, *columns}:
                    continue  # out of view or cut off
                pixels, in_front = project(
                    box_corners(env, name), env.renderer.intrinsics(camera), env.renderer.world_from_cam(camera)
                )
                assert in_front.all()
                low, high = pixels.min(axis=0), pixels.max(axis=0)
                assert (low - 1 <= [columns.min(), rows.min()]).all() and ([columns.max(), rows.max()] <= high).all()
                centre = (low + high) / 2
                assert np.linalg.norm(centre - [columns.mean(), rows.mean()]) < 0.2 * np.linalg.norm(high - low)
                seen[camera] += 1
    assert all(count >= 4 for count in seen.values()), seen


def test_colour_images_are_upright_like_the_segmentation(env):
    env.reset(3)
    for camera in env.scene.cameras:
        mask = np.isin(env.renderer.segmentation(camera), object_geoms(env, "can"))
        if mask.sum() > 20:
            red, green, blue = env.renderer.rgb(camera)[cv2.erode(mask.astype(np.uint8), np.ones((3, 3))) > 0].T
            assert np.median(red) > 2 * max(np.median(green), np.median(blue))


def test_wrist_camera_sees_the_grip_site_between_the_fingers(env):
    env.reset(0)
    model = env.sim.mj_model
    segmentation = env.renderer.segmentation("eih_cam")
    world_from_cam, K = env.renderer.world_from_cam("eih_cam"), env.renderer.intrinsics("eih_cam")
    pixel, in_front = project(env.world_from_ee[None, :3, 3], K, world_from_cam)
    columns = []
    for finger in ("gripper0_leftfinger", "gripper0_rightfinger"):
        geoms = np.flatnonzero(model.geom_bodyid == model.body(finger).id)
        columns.append(np.nonzero(np.isin(segmentation, geoms))[1].mean())
    assert in_front[0] and 0 <= pixel[0, 1] < SIZE
    assert min(columns) < pixel[0, 0] < max(columns)
    assert pixel[0, 0] == pytest.approx(np.mean(columns), abs=2)


def test_leaving_out_geometry_outside_the_view_changes_no_pixel(env, monkeypatch):
    for seed in range(3):
        env.reset(seed)
        culled = {camera: env.renderer.rgb(camera).copy() for camera in env.scene.cameras}
        assert all(len(env.renderer._out_of_view(camera)) > 5 for camera in env.scene.cameras)
        with monkeypatch.context() as patch:
            patch.setattr(env.renderer, "_out_of_view", lambda camera: np.zeros(0, int))
            for camera, image in culled.items():
                np.testing.assert_array_equal(image, env.renderer.rgb(camera))


def test_control_step_equals_robosuites_own(env):
    from robosuite.environments.base import MujocoEnv

    actions = np.random.default_rng(0).uniform(-1, 1, (6, 7))
    states = []
    for step in (lambda action: env.sim.step(action), lambda action: MujocoEnv.step(env.sim, action)):
        env.reset(5)
        for action in actions:
            step(action)
        states.append(env.sim.mj_data.qpos.copy())
    np.testing.assert_allclose(states[0], states[1], atol=1e-5)


def test_same_seed_gives_the_same_state_and_prompt(env):
    def state(seed):
        env.reset(seed)
        return env.sim.mj_data.qpos.copy(), env.prompt

    first, again, other = state([3, 1]), state([3, 1]), state([3, 2])
    np.testing.assert_array_equal(first[0], again[0])
    assert first[1] == again[1]
    assert np.abs(first[0] - other[0]).max() > 0.01


def test_evaluation_never_meets_a_recorded_initial_state(env, dataset):
    for episode in read_dataset(dataset.out)[1].values():
        env.reset(episode.seed)
        recorded = env.sim.mj_data.qpos.copy()
        env.reset([dataset.seed, episode.index, 0, EVALUATION_STREAM])
        assert np.abs(recorded - env.sim.mj_data.qpos).max() > 0.01


def test_start_pose_is_within_the_scenes_jitter_and_objects_keep_their_distance(env):
    robot, placement = env.scene.robot, env.scene.placement
    for seed in range(10):
        env.reset(seed)
        assert (np.abs(env.world_from_ee[:3, 3] - robot.ee_start) <= np.array(robot.ee_start_jitter) + 1e-3).all()
        np.testing.assert_allclose(env.world_from_ee[:3, 2], [0, 0, -1], atol=1e-3)
        assert env.openness == pytest.approx(1.0)
        centres = np.stack([env.world_from_object(name)[:2, 3] for name in env.scene.objects])
        gaps = np.linalg.norm(centres[:, None] - centres, axis=-1)[np.triu_indices(len(centres), 1)]
        assert gaps.min() >= placement.min_distance


def test_gripper_closes_and_opens_within_half_a_second(env):
    env.reset(0)
    hold = env.world_from_ee
    for openness, reached in ((0.0, lambda value: value < 0.05), (1.0, lambda value: value > 0.95)):
        for _ in range(12):
            env.step(pose_to_action(hold, openness, env.world_from_ee))
        assert reached(env.openness)


def test_observation_frame_has_the_planners_form(env):
    env.reset(1)
    env.step(np.zeros(7))
    frame = env.obs_frame()
    assert frame["ee_pose"].shape == (1, 4, 4) and frame["gripper"].shape == (1,) and frame["timestamp"] == 1.0
    for camera in env.scene.cameras:
        view = frame[camera]
        assert view["model"] == "pinhole" and view["camera"]["width"] == view["camera"]["height"] == SIZE
        assert view["data"]["color"].shape == (SIZE, SIZE, 3) and view["data"]["color"].dtype == np.uint8
        assert view["camera"]["K"].shape == (3, 3) and view["data"]["seg"] is None
        rotation = view["data"]["wcT"][:3, :3]
        np.testing.assert_allclose(rotation @ rotation.T, np.eye(3), atol=1e-9)
        assert np.linalg.det(rotation) == pytest.approx(1.0)


def count_successes(env, episodes, disturb=0.0):
    results = []
    for i in range(episodes):
        env.reset([11, i], env.scene.tasks[i % len(env.scene.tasks)])
        disturbance = Disturbance(np.random.default_rng(i), disturb)
        results.append(run_episode(env, ScriptedExpert(), 120, disturbance))
    return results


def test_expert_puts_the_named_object_into_the_bin(env):
    results = count_successes(env, 8)
    assert sum(result.success for result in results) >= 7
    assert all(result.approached_named for result in results if result.success)
    assert {result.object for result in results} == set(env.scene.objects)


@pytest.mark.slow
def test_expert_succeeds_in_nine_of_ten_episodes_even_when_pushed(env):
    results = count_successes(env, 30) + count_successes(env, 30, disturb=0.06)
    assert sum(result.success for result in results) >= 0.95 * len(results)
    assert 50 <= np.mean([result.steps for result in results]) <= 80


def test_random_motion_does_not_solve_the_task(env):
    env.reset([11, 0])
    assert not run_episode(env, RandomPolicy(np.random.default_rng(0)), 60).success


def test_success_needs_the_named_object(env):
    env.reset([11, 0], Task("milk", "dark_bin"))
    expert = ScriptedExpert()
    run_episode(env, expert, 120)
    assert env.success()
    env.task = Task("can", "dark_bin")
    assert not env.success()


def test_recorded_episode_is_a_valid_file_whose_desired_poses_lead_within_one_action(dataset):
    episodes = read_dataset(dataset.out)[1]
    assert sorted(episodes) == [0, 1] and episodes[0].object != episodes[1].object
    for episode in episodes.values():
        with Episode(dataset.out / episode.file, cameras=["e2h_cam", "eih_cam"]) as file:
            assert len(file) == episode.steps
            np.testing.assert_array_equal(file.timestamps, np.arange(episode.steps))
            lead = file.world_from_ee_desired[:, 0, :3, 3] - file.world_from_ee[:, 0, :3, 3]
            assert np.linalg.norm(lead, axis=1).max() < 0.0501
            assert set(np.unique(file.gripper_desired)) == {0.0, 1.0}
            assert file.rgb("eih_cam", 0).shape == (64, 64, 3)
            assert file.prompt() in load_scene("pickplace").prompts(Task(episode.object, episode.container))


def test_recorded_images_are_what_the_simulator_shows(dataset):
    episode = read_dataset(dataset.out)[1][0]
    with PickPlaceEnv("pickplace", image_size=64) as env, Episode(dataset.out / episode.file) as file:
        env.reset(episode.seed, Task(episode.object, episode.container))
        frame = env.obs_frame()
        for camera in env.scene.cameras:
            np.testing.assert_allclose(file.K(camera, 0), frame[camera]["camera"]["K"], rtol=1e-6)
            np.testing.assert_allclose(file.world_from_cam(camera, 0), frame[camera]["data"]["wcT"], atol=1e-6)
            difference = file.rgb(camera, 0).astype(int) - frame[camera]["data"]["color"]
            assert np.abs(difference).mean() < 8  # JPEG


def test_recording_goes_on_where_it_stopped_and_repeats_itself(dataset, tmp_path):
    before = (dataset.out / "episode_00000.hdf5").stat().st_mtime_ns
    (dataset.out / "episode_00001.hdf5").unlink()
    record(dataclasses.replace(dataset, workers=1))
    assert (dataset.out / "episode_00000.hdf5").stat().st_mtime_ns == before
    with PickPlaceEnv("pickplace", image_size=64) as env:
        record_episode(env, dataclasses.replace(dataset, out=tmp_path), 1)
    with Episode(tmp_path / "episode_00001.hdf5") as one, Episode(dataset.out / "episode_00001.hdf5") as other:
        np.testing.assert_array_equal(one.world_from_ee, other.world_from_ee)
        np.testing.assert_array_equal(one.rgb("e2h_cam", 5), other.rgb("e2h_cam", 5))
    with pytest.raises(ValueError, match="recorded with seed=0"):
        record(dataclasses.replace(dataset, seed=1))


class RecordedPlanner:
    """A planner that always predicts what a recorded episode did next: the upper bound of a cloned policy."""

    def __init__(self, path):
        self._replay = ReplayPolicy(path)
        self.prompts, self.queries = [], 0

    def reset(self):
        self._time = None

    def set_prompt(self, prompt):
        self.prompts.append(prompt)

    def add_obs_frame(self, frame):
        self._time = int(frame["timestamp"])

    def get_action(self):
        self.queries += 1
        steps = np.clip(self._time + np.arange(32), 0, len(self._replay._poses) - 1)
        poses, openness = self._replay._poses[steps], self._replay._openness[steps]
        return poses[None, :, None], openness[None, :, None], self._time + np.arange(1.0, 33.0), None


def test_chunks_of_recorded_poses_executed_through_the_planner_interface_succeed(env, dataset):
    for episode in read_dataset(dataset.out)[1].values():
        env.reset(episode.seed, Task(episode.object, episode.container))
        planner = RecordedPlanner(dataset.out / episode.file)
        result = run_episode(env, ModelPolicy(planner, execute_steps=8), 120)
        assert result.success and result.approached_named
        assert planner.prompts == [env.prompt] and planner.queries == -(-result.steps // 8)


def test_evaluation_writes_table_summary_and_videos(dataset, tmp_path):
    config = EvaluateConfig(
        out=tmp_path, policy="replay", demos=dataset.out, episodes=2, video=True, image_size=64, max_steps=120
    )
    summary = evaluate(config)
    assert summary["success"]["count"] == summary["approached_named"]["count"] == 2
    assert len((tmp_path / "episodes.csv").read_text().splitlines()) == 3
    assert json.loads((tmp_path / "summary.json").read_text())["versions"]["robosuite"]
    for index, episode in read_dataset(dataset.out)[1].items():
        video = cv2.VideoCapture(str(tmp_path / "videos" / f"episode_{index:03d}.mp4"))
        assert abs(video.get(cv2.CAP_PROP_FRAME_COUNT) - episode.steps) <= 5
        assert video.get(cv2.CAP_PROP_FRAME_WIDTH) == 2 * video.get(cv2.CAP_PROP_FRAME_HEIGHT) == 256


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"background": {"floor": "lava.png"}}, "background.floor: lava.png is not among robosuite's textures"),
        ({"objects": {"can": {"model": "TeapotObject"}}}, "objects.can.model: robosuite.models.objects has no Teapot"),
        ({"cameras": {"eih_cam": {"body": "elbow"}}}, "cameras.eih_cam.body: the simulation has no body 'elbow'"),
    ],
)
def test_scene_that_robosuite_cannot_build_is_refused_by_key(changes, message):
    scene = load_scene("pickplace")
    ((field, change),) = changes.items()
    value = getattr(scene, field)
    if isinstance(value, dict):
        ((name, inner),) = change.items()
        value = {**value, name: dataclasses.replace(value[name], **inner)}
    else:
        value = dataclasses.replace(value, **change)
    with pytest.raises(ValueError, match=message):
        PickPlaceEnv(dataclasses.replace(scene, **{field: value}))


def test_start_pose_out_of_reach_is_refused(env):
    with pytest.raises(ValueError, match="the arm cannot reach .* check robot.ee_start"):
        far = env.world_from_ee
        far[0, 3] += 2.0
        env.sim.solve_arm(far, env.sim.robots[0].init_qpos)


def test_a_tray_is_seen_in_its_colour_where_its_container_is_and_a_setting_has_its_own_light():
    scene = load_scene("trays")
    with PickPlaceEnv(scene, image_size=SIZE) as usual, PickPlaceEnv(scene.in_setting("UOUE"), SIZE) as unusual:
        for env in (usual, unusual):
            env.reset([3], scene.tasks[0])
        camera = next(iter(scene.cameras))
        pictures = [env.renderer.rgb(camera).astype(float) for env in (usual, unusual)]
        world_from_cam, K = usual.renderer.world_from_cam(camera), usual.renderer.intrinsics(camera)
    for container in scene.containers.values():
        point = world_from_cam[:3, :3].T @ (np.array([*container.drop, container.floor]) - world_from_cam[:3, 3])
        column, row = (K @ point / point[2])[:2].round().astype(int)
        assert pictures[0][row, column].argmax() == np.argmax(container.color)
    red, _, blue = (pictures[1].mean((0, 1)) / pictures[0].mean((0, 1))).tolist()
    assert red > blue  # a warmer lamp


def test_evaluation_of_a_setting_runs_its_tasks(tmp_path):
    config = EvaluateConfig(
        out=tmp_path, policy="random", episodes=3, max_steps=1, image_size=32, scene="trays", setting="UC"
    )
    assert set(evaluate(config)["objects"]) == {"milk", "bread", "cereal"}
    rows = (tmp_path / "episodes.csv").read_text().splitlines()[1:]
    assert all("green_tray" in row and "green tray" in row for row in rows)
