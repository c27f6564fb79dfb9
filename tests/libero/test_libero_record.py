"""Recording with the expert: which tasks and numbers, what is written down, what is refused; and replaying it."""

from __future__ import annotations

import json
from pathlib import Path

import h5py
import numpy as np
import pytest

from data_utils.cli import CommandLineError
from data_utils.convert.runner import Summary
from data_utils.errors import DataError
from data_utils.h5io import CameraData, EpisodeData, seal, write_episode
from examples.disturbance import Disturbance
from examples.errors import SimulatorError
from examples.libero import record, replay
from examples.libero.convert import BENCHMARK_ATTR, FIXTURES_ATTR, STATE_ATTR, TASK_ATTR
from examples.libero.record import LiberoRecorder, RecordConfig, chosen_tasks, main
from examples.libero.replay import SETTLE_STEPS
from examples.libero.replay_policy import CHUNK, ReplayPolicy, recorded_episodes
from examples.libero.rollout import EpisodeKey
from examples.libero.tasks import LiberoTask
from tests.libero.test_libero_language import make_tasks


@pytest.fixture
def tasks(tmp_path, monkeypatch) -> list[LiberoTask]:
    made = make_tasks(
        tmp_path / "package",
        put_the_bowl_on_the_plate="(On bowl_1 plate_1)",
        open_the_cabinet="(Open cabinet_1_shelf)",
        put_the_plate_on_the_bowl="(On plate_1 bowl_1)",
    )
    monkeypatch.setattr(LiberoTask, "fault", None)
    monkeypatch.setattr(record, "suite_tasks", lambda suite, benchmark: made)
    return made


def test_all_tasks_are_those_the_expert_can_do_and_others_are_named(tasks, capsys):
    assert chosen_tasks("libero", "libero_goal", "all") == [tasks[0], tasks[2]]
    assert capsys.readouterr().err.startswith("left out: libero_goal/open_the_cabinet: the expert cannot do open")
    assert chosen_tasks("libero", "libero_goal", "2,0") == [tasks[2], tasks[0]]
    with pytest.raises(SimulatorError, match="the expert cannot do open cabinet_1_shelf"):
        chosen_tasks("libero", "libero_goal", "1")
    for wrong in ("3", "-1", "0;1", ""):
        with pytest.raises(SimulatorError, match="wanted all, or numbers from 0 to 2"):
            chosen_tasks("libero", "libero_goal", wrong)


def test_every_episode_of_every_task_is_a_file(tasks):
    recorder = LiberoRecorder(RecordConfig("libero_goal", Path("out"), episodes=2), tasks[:1])
    assert [job.name for job in recorder.jobs()] == [
        "libero_goal/put_the_bowl_on_the_plate/demo_0000",
        "libero_goal/put_the_bowl_on_the_plate/demo_0001",
    ]


@pytest.mark.parametrize("flag", [{"episodes": 0}, {"workers": 0}, {"image_size": 8}, {"noise": -0.1}, {"seed": -1}])
def test_flags_out_of_range_are_named(flag):
    with pytest.raises(CommandLineError, match=f"--{next(iter(flag))} is"):
        RecordConfig("libero_goal", Path("out"), **flag)


def test_mistakes_are_one_line(capsys):
    assert main(["--suite", "libero_goal", "--out", "x", "--episodes", "0"]) == 2
    assert main(["--suit", "libero_goal"]) == 2
    assert capsys.readouterr().err.count("\n") == 2


def test_a_recording_that_was_stopped_says_what_is_missing(tasks, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(record.environment, "check_assets", lambda benchmark: None)
    monkeypatch.setattr(record.environment, "versions", lambda benchmark: {})
    stopped = Summary(10, already_there=2, converted=3, skipped={"a": "the expert failed"}, interrupted=True)
    monkeypatch.setattr(record, "run", lambda *_, **__: stopped)
    assert record.record(RecordConfig("libero_goal", tmp_path)) == 130
    assert "interrupted; the same command goes on with the 4 that are missing" in capsys.readouterr().err


def test_pushes_leave_the_desired_pose_and_end():
    disturbance = Disturbance(np.random.default_rng(0), 0.2, size=0.03)
    pose = np.eye(4)
    offsets = np.array([disturbance(pose)[:3, 3] for _ in range(400)])
    pushed = np.linalg.norm(offsets, axis=1) > 0
    assert 0.3 < pushed.mean() < 0.8 and np.linalg.norm(offsets[:, :2], axis=1).max() <= 0.03
    np.testing.assert_array_equal(pose, np.eye(4))


# -- replaying --------------------------------------------------------------------------------------------------------


def write_recorded(path: Path, task: LiberoTask, steps: int = 20, **attributes: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    poses = np.repeat(np.eye(4)[None, None], steps, axis=0)
    poses[:, 0, 0, 3] = np.arange(steps) / 100
    openness = np.linspace(1, 0, steps)[:, None]
    camera = CameraData(
        np.eye(4), np.array([[8.0, 0, 8], [0, 8, 8], [0, 0, 1]]), [np.zeros((16, 16, 3), np.uint8)] * steps
    )
    told = {
        TASK_ATTR: f"{task.suite}/{task.name}",
        BENCHMARK_ATTR: "libero",
        STATE_ATTR: json.dumps([0.0, 0.1]),
        FIXTURES_ATTR: json.dumps({"cabinet_1": [0.0] * 7}),
    }
    data = EpisodeData(
        timestamp=np.arange(steps, dtype=np.float64),
        world_from_ee=poses,
        gripper=openness,
        prompts=["do"],
        cameras={"agentview": camera},
        world_from_ee_desired=poses,
        gripper_desired=openness,
        attributes=told | attributes,
    )
    write_episode(path, data)


class Clock:
    time = 0


@pytest.fixture
def demos(tmp_path, tasks, monkeypatch) -> Path:
    monkeypatch.setattr(replay, "find_task", lambda name, benchmark: next(t for t in tasks if t.name in name))
    for task in (tasks[0], tasks[2]):
        for number in range(2):
            write_recorded(tmp_path / f"demos/{task.name}/demo_{number:04d}.h5", task, steps=20 + number)
    return tmp_path / "demos"


def test_recorded_episodes_are_counted_by_task(demos):
    assert recorded_episodes(demos) == {"libero_goal": {0: [0, 1], 2: [0, 1]}}


def test_a_replay_starts_where_its_episode_did_and_gives_its_desired_poses_in_chunks(demos, tasks):
    policy, key = ReplayPolicy(demos), EpisodeKey("libero_goal", 2, 1)
    start = policy.start(tasks[2], key)
    assert start.state.tolist() == [0.0, 0.1] and list(start.fixtures) == ["cabinet_1"] and start.wait_steps == 0
    env = Clock()
    policy.begin(env, "do", key)
    env.time = 3
    plan = policy.plan(env)
    np.testing.assert_allclose(plan.poses[:, 0, 3], np.arange(3, 3 + CHUNK) / 100, atol=1e-6)
    env.time = 19
    plan = policy.plan(env)
    assert plan.poses[1:, 0, 3] == pytest.approx(0.2) and plan.openness[1:] == pytest.approx(0.0)  # the last is held
    env.time = 21 + SETTLE_STEPS
    assert policy.plan(env) is None


def test_episodes_of_other_origins_are_refused(demos, tasks):
    with pytest.raises(DataError, match="holds no episode files"):
        ReplayPolicy(demos / "nowhere")
    file = demos / "other.h5"
    write_recorded(file, tasks[0])
    with h5py.File(file, "a") as opened:
        del opened.attrs[STATE_ATTR]
        seal(opened)
    with pytest.raises(DataError, match=f"has no {STATE_ATTR}; wanted an episode converted from LIBERO or recorded"):
        ReplayPolicy(demos)
