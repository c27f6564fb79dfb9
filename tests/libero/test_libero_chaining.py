"""Which tasks can follow one another in a scene, and how a sequence of instructions is run."""

from __future__ import annotations

import numpy as np
import pytest

from examples.libero.chaining import CHAINING, COACHING, ChainingConfig, compatible, find_pairs, rates, trials
from examples.libero.rollout import EpisodeKey, Plan, Policy, Start
from examples.libero.tasks import LiberoTask
from examples.libero.trials import Stage, Trial, run_trial
from examples.libero.workers import Episode
from tests.libero.test_libero_language import make_tasks

BOWL, PLATE = (("on", "bowl_1", "plate_1"),), (("on", "plate_1", "table"),)


@pytest.fixture
def tasks(tmp_path, monkeypatch) -> list[LiberoTask]:
    monkeypatch.setattr(LiberoTask, "fault", None)
    return make_tasks(
        tmp_path,
        put_the_bowl_on_the_plate="(On bowl_1 plate_1)",
        put_the_bowl_in_the_basket="(In bowl_1 basket_1_inside)",
        put_the_plate_on_the_shelf="(On plate_1 cabinet_1_shelf)",
        put_the_cup_on_the_shelf=("cup_1 - cup cabinet_1 - cabinet", "(On cup_1 cabinet_1_shelf)"),
    )


def test_a_thing_cannot_be_asked_to_two_places(tasks):
    assert not compatible(tasks[0], tasks[1])
    assert compatible(tasks[0], tasks[2])


def test_pairs_are_of_one_scene_and_every_first_task_has_its_turn(tasks):
    pairs = [(first.task_id, second.task_id) for first, second in find_pairs(tasks)]
    assert pairs == [(0, 2), (1, 2), (2, 0), (2, 1)]


def test_coaching_sends_two_instructions_and_chaining_one_sentence_for_twice_the_steps(tasks):
    episodes = [Episode(EpisodeKey("libero_goal", 0, number), tasks[0], tasks[0].language, 300) for number in (0, 1)]
    groups = trials(find_pairs(tasks)[:1], episodes)
    assert [trial.row for trial in groups[COACHING]] == [(2, 0), (2, 1)]
    coached, chained = groups[COACHING][0], groups[CHAINING][0]
    words = ["put the bowl on the plate", "put the plate on the shelf"]
    assert [stage.instruction for stage in coached.stages] == words and coached.max_steps == 300
    assert [stage.instruction for stage in chained.stages] == [" and then ".join(words)] and chained.max_steps == 600
    assert coached.watched == chained.watched
    assert coached.watched[2] == tasks[0].problem.goal + tasks[2].problem.goal


class Table:
    """What :func:`run_trial` needs of an environment; ``after`` maps a goal to the steps during which it holds."""

    world_from_ee = np.eye(4)

    def __init__(self, after: dict) -> None:
        self.task, self.time, self._after = None, 0, after

    def reset(self, seed):
        self.time = 0

    def set_fixtures(self, poses):
        pass

    def step(self, action):
        self.time += 1

    def holds(self, goal):
        return all(self.time in self._after[predicate] for predicate in goal)


class Listener(Policy):
    """Notes when it was told what."""

    def __init__(self):
        self.told = []

    def start(self, task, episode):
        return Start(wait_steps=0)

    def begin(self, env, instruction, episode):
        self.told.append((env.time, instruction))

    def instruct(self, env, instruction):
        self.told.append((env.time, instruction))

    def plan(self, env):
        return Plan(np.eye(4)[None], np.ones(1))


def run(after: dict, *stages: Stage, wanted=(2,)) -> tuple:
    both = BOWL + PLATE
    trial = Trial(
        EpisodeKey("s", 0, 0), None, "", 10, stages=stages, watched=(BOWL, PLATE, both), wanted=wanted
    )  # fmt: skip
    policy = Listener()
    return policy, *run_trial(Table(after), policy, trial, execute_steps=1)


def test_the_second_instruction_follows_when_the_first_goal_holds():
    policy, result, ever, held = run(
        {BOWL[0]: range(4, 99), PLATE[0]: range(9, 99)}, Stage("bowl", (BOWL,)), Stage("plate", (PLATE,))
    )
    assert policy.told == [(0, "bowl"), (4, "plate")]
    assert (result.success, result.steps, ever, held) == (True, 9, (True, True, True), (True, True, True))
    assert len(result.ee_path) == 10


def test_the_second_instruction_follows_when_time_for_the_first_is_up():
    policy, result, ever, held = run(
        {BOWL[0]: (), PLATE[0]: range(12, 99)}, Stage("bowl", (BOWL,)), Stage("plate", (PLATE,))
    )
    assert policy.told == [(0, "bowl"), (10, "plate")]
    assert (result.success, result.steps, ever, held) == (False, 12, (False, True, False), (False, True, False))


def test_a_first_goal_that_is_undone_counts_for_itself_and_not_for_the_whole():
    _, result, ever, held = run(
        {BOWL[0]: range(2, 6), PLATE[0]: range(8, 99)}, Stage("bowl", (BOWL,)), Stage("plate", (PLATE,))
    )
    assert (result.success, ever, held) == (False, (True, True, False), (False, True, False))
    cells = rates([{"ever": ever, "held": held}])
    assert {part: cell.rate for part, cell in cells.items()} == {"first": 1.0, "second": 1.0, "both": 0.0}


def test_one_sentence_ends_when_both_goals_hold():
    policy, result, _, _ = run({BOWL[0]: range(3, 99), PLATE[0]: range(7, 99)}, Stage("both", (BOWL + PLATE,)))
    assert policy.told == [(0, "both")] and result.success and result.steps == 7


def test_flags_that_make_no_sense_are_refused(tmp_path):
    with pytest.raises(ValueError, match="--pairs is 0"):
        ChainingConfig(policy="random", pairs=0)
    with pytest.raises(ValueError, match="replay repeats single tasks"):
        ChainingConfig(policy="replay", demos=tmp_path)
