"""An evaluation's episodes, what its command refuses, and how the model is asked and followed."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from apt.infer.contract import ObservationContract
from apt.infer.planner import TrajPlanner
from data_utils.datasets import LiberoObject, PickPlaceCan
from examples.errors import SimulatorError
from examples.libero import environment, worklist
from examples.libero.benchmarks import find_category
from examples.libero.environment import unpinned
from examples.libero.evaluate import EvaluateConfig, main
from examples.libero.language import LanguageConfig
from examples.libero.model_policy import ModelPolicy, _check_contract
from examples.libero.policies import POLICIES, RandomPolicy, make_policy
from examples.libero.policy_settings import PolicyError, PolicySettings
from examples.libero.rollout import EpisodeKey, run_episode
from examples.libero.tasks import LiberoTask
from examples.libero.worklist import parse_task_ids, plan_work, step_cap, suite_folder, video_file
from tests.infer.helpers import tiny_policy

KEY = EpisodeKey("libero_object", 0, 0)


# -- the work ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def four_tasks(monkeypatch) -> None:
    """A suite of four tasks with 3 initial states each; the third cannot be run."""
    tasks = [LiberoTask("libero_object", number, f"task_{number}", Path()) for number in range(4)]
    monkeypatch.setattr(worklist, "suite_tasks", lambda suite, benchmark: tasks)
    monkeypatch.setattr(LiberoTask, "initial_states", lambda self: np.zeros((3, 5)))
    monkeypatch.setattr(LiberoTask, "fault", property(lambda self: "no states" if self.task_id == 2 else None))


def planned(task_ids=slice(0, None), trials=None, **changed):
    work = plan_work("libero", ["libero_object"], task_ids, trials, 7, 500, **changed)[0]
    return work, [(episode.key.task_id, episode.key.episode_id) for episode in work.episodes]


def test_every_task_gets_its_trials_and_one_that_cannot_be_run_is_counted(four_tasks):
    work, keys = planned(trials=2)
    assert keys == [(0, 0), (0, 1), (1, 0), (1, 1), (3, 0), (3, 1)] and work.skipped == {2: "no states"}
    assert work.episodes[0].key == EpisodeKey("libero_object", 0, 0, seed=7)
    assert (work.episodes[0].instruction, work.episodes[0].max_steps) == ("task 0", 500)


def test_a_task_has_no_more_trials_than_initial_states(four_tasks):
    assert len(planned()[1]) == 9  # the benchmark's 50, of which 3 are stored
    with pytest.raises(SimulatorError, match="task 0 has 3 initial states; lower --num_trials_per_task 4"):
        planned(trials=4)


def test_a_run_may_begin_at_a_task_or_be_of_one_alone(four_tasks):
    assert {task for task, _ in planned(slice(1, None))[1]} == {1, 3}
    assert {task for task, _ in planned(slice(1, 2))[1]} == {1}
    with pytest.raises(SimulatorError, match="has tasks 0 to 3; lower --begin_task_id 4"):
        planned(slice(4, None))


def test_tasks_are_chosen_by_their_numbers_and_ranges(four_tasks):
    assert parse_task_ids("0,3,1-3") == (0, 3, 1, 2) and parse_task_ids("") == ()
    assert {task for task, _ in planned(parse_task_ids("3,0-1"))[1]} == {0, 1, 3}
    with pytest.raises(SimulatorError, match="libero_object has tasks 0 to 3, and none 4; see --task_ids"):
        planned((0, 4))
    for wrong in ("3-1", "1,", "a", "-1"):
        with pytest.raises(ValueError, match="wanted numbers with commas and ranges"):
            parse_task_ids(wrong)


def test_tasks_of_plus_are_chosen_by_what_was_changed(monkeypatch):
    names = ["lift_it_light_1", "lift_it_add_1", "lift_it_view_0_0_100_2_4_initstate_0"]
    tasks = [LiberoTask("libero_goal", number, name, Path(), "libero-plus") for number, name in enumerate(names)]
    chosen = worklist._chosen("libero_goal", tasks, slice(0, None), {find_category("camera"), find_category("LIGHT")})
    assert chosen == [tasks[0], tasks[2]]
    with pytest.raises(SimulatorError, match="none of the chosen tasks of libero_goal is of the categories Sensor"):
        worklist._chosen("libero_goal", tasks, (0, 1), {find_category("Sensor Noise")})


def test_a_task_that_the_policy_cannot_do_is_left_out_before_anything_is_built(four_tasks):
    work, keys = planned(trials=1, inability=lambda task: "too hard" if task.task_id == 1 else None)
    assert keys == [(0, 0), (3, 0)] and work.skipped == {1: "too hard", 2: "no states"}


def test_recorded_episodes_are_run_instead_of_stored_states(four_tasks):
    recorded = {"libero_object": {1: [4, 2], 3: [0]}, "libero_goal": {0: [0]}}
    assert planned(recorded=recorded)[1] == [(1, 2), (1, 4), (3, 0)]
    assert planned(trials=1, recorded=recorded)[1] == [(1, 2), (3, 0)]


@pytest.mark.parametrize(
    ("suite", "cap"),
    [("libero_spatial", 220), ("libero_object_swap", 280), ("libero_goal_task", 300), ("libero_10", 520)],
)
def test_peers_caps_depend_on_the_suite(suite, cap):
    assert step_cap(suite, "peers") == cap and step_cap(suite, 123) == 123
    with pytest.raises(SimulatorError, match="no published step cap is known for the suite 'libero_100'"):
        step_cap("libero_100", "peers")


def test_results_and_videos_lie_where_the_contract_says():
    assert suite_folder(Path("r"), "libero_object", "b16") == Path("r/libero_object_b16")
    assert suite_folder(Path("r"), "libero_object", "") == Path("r/libero_object")
    key = EpisodeKey("libero_goal_swap", 3, 12)
    file = video_file(Path("v"), "libero_goal_swap", "b16", "apt", key)
    assert file == Path("v/libero_goal_swap_b16/apt/task003/ep012.mp4")


def test_benchmarks_whose_suites_have_one_name_have_results_of_their_own():
    plain, plus = (EvaluateConfig(benchmark=name, policy="random") for name in ("libero", "libero-plus"))
    assert (plain.save_root, plain.video_root) == (Path("results/libero"), Path("results/libero_videos"))
    assert (plus.save_root, plus.video_root) == (Path("results/libero-plus"), Path("results/libero-plus_videos"))
    told = LanguageConfig(benchmark="libero-plus", policy="random")
    assert told.save_root == Path("results/libero-plus_language")
    assert EvaluateConfig(policy="random", save_root=Path("here")).save_root == Path("here")


def test_versions_that_are_not_the_pinned_ones_are_named():
    assert unpinned({"mujoco": "3.3.2", "robosuite": "1.4.1"}) == []
    (line,) = unpinned({"mujoco": "3.4.0", "robosuite": "1.4.1"})
    assert line == "warning: mujoco is 3.4.0, not the pinned 3.3.2: results may differ from others'"


# -- the command ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--modle_name", "x"], "unknown flag --modle_name"),
        (["--benchmark", "libero-max"], "Expected one of ('libero', 'libero-pro', 'libero-plus')"),
        ([], "--model_name is missing: it names the result files"),
        (["--policy", "replay"], "--policy replay and --demos DIR"),
        (["--policy", "random", "--max_steps", "0"], "--max_steps is 0; it must be at least 1"),
        (["--policy", "random", "--max_steps", "many"], "--max-steps"),
        (["--policy", "random", "--task_ids", "3-1"], "--task_ids '3-1': wanted numbers with commas and ranges"),
        (
            ["--policy", "random", "--categories", "light"],
            "--categories are LIBERO-plus's; add --benchmark",
        ),
        (["--policy", "random", "--benchmark", "libero-plus", "--categories", "l"], "there is no category 'l'"),
        (["--model_name", "x", "--ensemble", "2"], "--ensemble belongs to --ckpt"),
        (["--model_name", "x", "--ckpt", "none.pt"], "--ckpt none.pt: no such file"),
    ],
)
def test_a_command_line_that_cannot_be_meant_is_refused_in_one_line(arguments, says, capsys, monkeypatch):
    monkeypatch.setattr(environment, "enter_libero", lambda command: pytest.fail("went on"))
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and says in said and said.count("\n") == 1


def test_an_unknown_policy_is_named():
    with pytest.raises(PolicyError, match="no policy 'luck'; there are model, expert, replay, random"):
        make_policy(PolicySettings("luck"))
    assert isinstance(POLICIES["random"](PolicySettings()), RandomPolicy)


# -- the model --------------------------------------------------------------------------------------------------------


class Scene:
    """What a policy asks of a ``LiberoEnv``: a hand that goes where actions send it, and two cameras."""

    task = LiberoTask("libero_object", 0, "task_0", Path())
    rendered = 0

    @classmethod
    def begun(cls) -> Scene:
        scene = cls()
        scene.reset(0)
        scene.set_state(None)
        return scene

    def reset(self, seed: int) -> None:
        self.world_from_ee = np.diag([1.0, -1, -1, 1])
        self.world_from_ee[2, 3] = 0.4

    def set_fixtures(self, poses) -> None:
        return

    def set_state(self, state) -> None:
        self.time, self.openness = 0, 1.0

    def step(self, action) -> None:
        self.world_from_ee = self.world_from_ee.copy()
        self.world_from_ee[:3, 3] += 0.05 * action[:3]
        self.time += 1

    def success(self) -> bool:
        return False

    def rgb(self, camera: str) -> np.ndarray:
        self.rendered += 1
        return np.random.default_rng(self.time).integers(0, 255, (96, 96, 3), dtype=np.uint8)

    def intrinsics(self, camera: str) -> np.ndarray:
        return np.array([[100.0, 0, 48], [0, 100, 48], [0, 0, 1]])

    def world_from_cam(self, camera: str) -> np.ndarray:
        pose = np.diag([1.0, -1, -1, 1])
        pose[2, 3] = 1.0
        return pose


@pytest.fixture(scope="module")
def trained():
    return tiny_policy()


def planner_of(policy, **changed) -> tuple[TrajPlanner, dict]:
    planner = TrajPlanner.of_policy(policy, ensemble=2, steps=2)
    config = dataclasses.replace(LiberoObject.config, image_hw=(64, 64), **changed)
    planner.set_config(config)
    return planner, ObservationContract(config).to_dict()


@pytest.fixture(autouse=True)
def _stored_states(monkeypatch):
    monkeypatch.setattr(LiberoTask, "initial_states", lambda self: np.zeros((9, 1)))


def rolled_out(policy: ModelPolicy, key: EpisodeKey):
    env = Scene()
    return run_episode(env, policy, key, "pick up the soup", max_steps=4, execute_steps=3), env


def test_an_episode_of_the_model_does_not_depend_on_those_before_it(trained):
    policy = ModelPolicy(*planner_of(trained))
    keys = [dataclasses.replace(KEY, episode_id=number) for number in (0, 1, 0)]
    first, second, again = (rolled_out(policy, key)[0].ee_path for key in keys)
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, second)  # noise of its own


def test_frames_are_rendered_at_queries_alone(trained):
    result, env = rolled_out(ModelPolicy(*planner_of(trained)), KEY)
    assert result.queries == 2 and env.rendered == 4  # by two cameras


def test_the_model_is_told_the_instruction(trained):
    policy, env = ModelPolicy(*planner_of(trained)), Scene.begun()
    plans = []
    for instruction in ("pick up the soup", "open the drawer"):
        policy.begin(env, instruction, KEY)
        plans.append(policy.plan(env).poses)
    assert not np.array_equal(*plans)


def test_a_policy_of_several_images_is_shown_the_steps_between_queries(trained):
    planner, contract = planner_of(trained, num_obs=2)
    _, env = rolled_out(ModelPolicy(planner, contract), KEY)
    assert env.rendered == 8


def test_a_chunk_of_coarser_steps_is_followed_step_by_step(trained):
    policy = ModelPolicy(*planner_of(trained, sample_state_gaps=2))
    env = Scene.begun()
    policy.begin(env, "pick up the soup", KEY)
    plan = policy.plan(env)
    policy.begin(env, "pick up the soup", KEY)
    policy._planner.add_obs_frame(policy._frame(env, render=True))
    poses, openness, times, _ = policy._planner.get_action()
    assert times[:2].tolist() == [2, 4] and len(plan.poses) == 64
    np.testing.assert_allclose(plan.poses[1::2], poses[0, :, 0], atol=1e-6)
    np.testing.assert_allclose(plan.openness[1::2], openness[0, :, 0], atol=1e-6)
    between = (poses[0, 0, 0, :3, 3] + poses[0, 1, 0, :3, 3]) / 2
    np.testing.assert_allclose(plan.poses[2, :3, 3], between, atol=1e-6)


def test_a_frame_meets_the_contract_that_it_is_made_for(trained):
    planner, contract = planner_of(trained)
    policy, env = ModelPolicy(planner, contract), Scene.begun()
    wanted = ObservationContract(planner.get_config())
    assert wanted.differences(policy._frame(env, render=True)) == []
    _check_contract(contract)


def test_a_policy_of_another_robot_is_refused_with_everything_that_differs():
    contract = ObservationContract(dataclasses.replace(PickPlaceCan.config, sample_dt=0.05)).to_dict()
    contract["arms"]["fewest"] = 2
    with pytest.raises(PolicyError, match="it wants e2h_cam.*it moves 2 arms.*its times are seconds"):
        _check_contract(contract)
