"""What other instructions an episode can be given, and what the language-sensitivity score makes of the outcomes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from examples.errors import SimulatorError
from examples.libero.language import TRUE, Score, other_task, path_distance, score, trials
from examples.libero.rollout import EpisodeKey
from examples.libero.summary_tables import Cell
from examples.libero.tasks import LiberoTask
from examples.libero.trials import others_in_scene
from examples.libero.workers import Episode

SCENE = """(define (problem LIBERO_Tabletop_Manipulation)
  (:domain robosuite) (:language {words})
  (:regions (shelf (:target cabinet_1)) (inside (:target basket_1)))
  (:fixtures table - table cabinet_1 - cabinet)
  (:objects {things})
  (:init (On bowl_1 table))
  (:goal (And {goal})))
"""
THINGS = "bowl_1 plate_1 - dish basket_1 - basket"


def make_tasks(root: Path, **goals: str | tuple[str, str]) -> list[LiberoTask]:
    """Tasks by name; each with a goal, or with the scene's things and a goal."""
    made = []
    for name, told in goals.items():
        things, goal = (THINGS, told) if isinstance(told, str) else told
        task = LiberoTask("libero_goal", len(made), name, root)
        task.bddl_file.parent.mkdir(parents=True, exist_ok=True)
        task.bddl_file.write_text(SCENE.format(words=name, things=things, goal=goal))
        made.append(task)
    return made


@pytest.fixture
def tasks(tmp_path, monkeypatch) -> list[LiberoTask]:
    monkeypatch.setattr(LiberoTask, "fault", None)
    return make_tasks(
        tmp_path,
        put_the_bowl_on_the_plate="(On bowl_1 plate_1)",
        put_the_bowl_in_the_basket="(In bowl_1 basket_1_inside)",
        put_the_bowl_on_that_plate="(On bowl_1 plate_1)",
        leave_the_bowl_on_the_table="(On bowl_1 table)",
        put_the_cup_on_the_shelf=("cup_1 - cup basket_1 - basket", "(On cup_1 cabinet_1_shelf)"),
    )


def test_another_task_can_be_asked_for_where_its_things_are_there_and_its_goal_is_another_and_open(tasks):
    assert [task.task_id for task in others_in_scene(tasks[0], tasks)] == [1]
    assert [task.task_id for task in others_in_scene(tasks[4], tasks)] == []


def episode(task: LiberoTask, number: int = 0) -> Episode:
    return Episode(EpisodeKey(task.suite, task.task_id, number), task, task.language, 300)


def test_an_episode_is_told_another_task_s_instruction_checkable_where_possible(tasks):
    other, checkable = other_task(episode(tasks[0]), tasks)
    assert checkable and other.language == "put the bowl in the basket"
    told = {other_task(episode(tasks[4], number), tasks)[0].name for number in range(30)}
    assert told == {task.name for task in tasks[:4]}  # none can be checked there: any other wording
    assert not other_task(episode(tasks[4]), tasks)[1]
    with pytest.raises(SimulatorError, match="no task with another instruction"):
        other_task(episode(tasks[0]), tasks[:1])


def test_three_runs_share_the_scene_and_two_of_them_the_noise(tasks):
    groups = trials([episode(tasks[0])], tasks)
    true, swapped, repeated = (group[0] for group in groups.values())
    scenes = {trial.key.derived_seed("scene") for trial in (true, swapped, repeated)}
    noises = [trial.key.derived_seed("policy") for trial in (true, swapped, repeated)]
    assert len(scenes) == 1 and noises[0] == noises[1] != noises[2]
    assert [stage.instruction for stage in swapped.stages] == ["put the bowl in the basket"]
    assert swapped.watched == (tasks[0].problem.goal, tasks[1].problem.goal) and swapped.wanted == (1,)
    assert true.stages == repeated.stages and true.wanted == (0,)
    assert groups[TRUE][0].row == (0, 0)


def run(number: int, ever: list[bool], path: list, **more) -> dict:
    return {"task_id": 0, "episode_id": number, "ever": ever, "path": path, **more}


def test_the_score_tells_a_policy_that_heeds_from_one_that_does_not():
    still, moved = [[0.0, 0.0, 0.0]] * 4, [[0.1, 0.0, 0.0]] * 4
    heeds = {
        "true": [run(0, [True], still), run(1, [True], still)],
        "swapped": [run(0, [False, True], moved, checkable=True), run(1, [False], moved, checkable=False)],
        "repeated": [run(0, [True], still), run(1, [True], still)],
    }
    found = score(heeds)
    assert (found.true.rate, found.ignored.rate, found.followed.rate, found.score) == (1.0, 0.0, 1.0, 1.0)
    assert found.followed.episodes == 1
    assert found.change == pytest.approx(0.1) and found.repeat == 0.0
    assert found.ratio == pytest.approx(100.0)  # a repeat counts as at least 1 mm
    ignores = heeds | {"swapped": [run(number, [True], still, checkable=False) for number in range(2)]}
    found = score(ignores)
    assert (found.score, found.followed, found.change) == (0.0, None, 0.0)


def test_a_noisy_policy_that_ignores_its_instruction_has_a_ratio_of_one():
    assert Score(Cell(0.5, 4), Cell(0.5, 4), None, 0.04, 0.04).ratio == pytest.approx(1.0)


@given(st.integers(1, 20), st.integers(1, 20), st.floats(0, 1))
def test_paths_are_compared_at_the_same_times_as_long_as_both_last(one, other, offset):
    path = np.arange(60.0).reshape(20, 3)
    assert path_distance(path[:one], path[:other] + [0, 0, offset]) == pytest.approx(offset)
