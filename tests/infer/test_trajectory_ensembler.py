"""The ensembler's rules; its numbers are checked against recorded ones in test_data_geometry.py."""

import numpy as np
import pytest

from infer_utils.trajectory_ensembler import TrajectoryEnsembler
from tests.data.episodes import poses


def trajectory(start, height=0.0, openness=0.0, steps=5, arms=1):
    times = start + np.arange(1, steps + 1, dtype=float)
    world_from_ee = poses(times, arms)
    world_from_ee[..., 2, 3] = height
    return times, world_from_ee, np.full((steps, arms), openness)


@pytest.mark.parametrize("n", [0, 1])
def test_an_ensemble_of_none_or_one_returns_the_input(n):
    ensembler = TrajectoryEnsembler(n)
    for start in range(3):
        given = trajectory(start, height=start, openness=0.3)
        returned = ensembler.add(*given)
        np.testing.assert_array_equal(returned[0], given[1])
        np.testing.assert_array_equal(returned[1], given[2])


def test_weights_rise_from_a_tenth_to_one_with_age_and_count_only_where_both_reach():
    ensembler = TrajectoryEnsembler(4)
    ensembler.add(*trajectory(0, height=0.0, openness=0.0))  # times 1..5
    blended, openness = ensembler.add(*trajectory(2, height=1.1, openness=1.1, arms=1))  # times 3..7
    # The old one counts while its first time <= q < its last: at 3 and 4, not at 5.
    np.testing.assert_allclose(blended[:, 0, 2, 3], [1.0, 1.0, 1.1, 1.1, 1.1])
    np.testing.assert_allclose(openness[:, 0], [1.0, 1.0, 1.1, 1.1, 1.1])


def test_trajectories_that_agree_are_not_changed():
    ensembler = TrajectoryEnsembler(4)
    for start in range(6):
        given = trajectory(start, arms=2)
        blended, _ = ensembler.add(*given)
        np.testing.assert_allclose(blended, given[1], atol=1e-12)
    assert len(ensembler) == 4


def test_trajectories_that_ended_before_the_new_one_are_forgotten():
    ensembler = TrajectoryEnsembler(4)
    ensembler.add(*trajectory(0))
    ensembler.add(*trajectory(4.5))
    assert len(ensembler) == 1


def test_resizing_and_resetting_forget():
    ensembler = TrajectoryEnsembler(4)
    for start in range(4):
        ensembler.add(*trajectory(start, height=start))
    ensembler.resize(2)
    assert len(ensembler) == 2
    ensembler.reset()
    given = trajectory(9)
    np.testing.assert_array_equal(ensembler.add(*given)[0], given[1])
    with pytest.raises(ValueError, match="ensemble size"):
        ensembler.resize(-1)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda t, p, o: (t[:-1], p, o), "openness"),
        (lambda t, p, o: (t, p[:, 0], o), "poses"),
        (lambda t, p, o: (t[::-1], p, o), "increase"),
        (lambda t, p, o: (t, p * np.nan, o), "finite"),
    ],
)
def test_a_wrong_trajectory_is_refused_and_forgotten(change, match):
    ensembler = TrajectoryEnsembler(4)
    with pytest.raises(ValueError, match=match):
        ensembler.add(*change(*trajectory(0)))
    assert len(ensembler) == 0


def test_a_robot_with_other_arms_must_reset_first():
    ensembler = TrajectoryEnsembler(4)
    ensembler.add(*trajectory(0))
    with pytest.raises(ValueError, match="reset"):
        ensembler.add(*trajectory(1, arms=2))


def test_what_is_kept_is_a_copy():
    ensembler = TrajectoryEnsembler(4)
    first = trajectory(0)
    ensembler.add(*first)
    first[1][...] = np.nan
    assert np.isfinite(ensembler.add(*trajectory(1))[0]).all()
