"""Flow matching: times as the papers draw them, velocities that lead where they should."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from apt.model.objectives.base import Guide, Schedule
from apt.model.objectives.flow import FlowMatching
from apt.model.objectives.registry import PREDICTIONS

NOISE = torch.randn(512, 10, generator=torch.Generator().manual_seed(0)).double()


def exact(flow: FlowMatching, steps: int) -> Schedule:
    schedule = flow.schedule(steps)
    return Schedule(schedule.timesteps, schedule.coefficients.double())


def test_times_are_distributed_as_in_the_papers():
    told = FlowMatching(100, 10).draw_timesteps(200_000, torch.device("cpu"), torch.Generator().manual_seed(0))
    time = 1 - told.double().numpy() / 100  # from noise at 0 to action at 1
    assert 0 <= time.min() and time.max() <= 0.999
    wanted = stats.beta(1.5, 1)
    drawn = (0.999 - time) / 0.999
    assert drawn.mean() == pytest.approx(wanted.mean(), abs=2e-3)
    quantiles = np.linspace(0.02, 0.98, 25)
    np.testing.assert_allclose(np.quantile(drawn, quantiles), wanted.ppf(quantiles), atol=5e-3)
    assert stats.kstest(drawn, wanted.cdf).pvalue > 1e-3


def test_noise_is_mixed_in_by_the_time_that_the_network_is_told():
    flow = FlowMatching(100, 10)
    clean, noise = torch.randn(2, 4, 1, 8, 10, generator=torch.Generator().manual_seed(0))
    mixed = flow.add_noise(clean, noise, torch.tensor([0.0, 25.0, 50.0, 100.0]))
    for row, share in enumerate((0.0, 0.25, 0.5, 1.0)):
        torch.testing.assert_close(mixed[row], (1 - share) * clean[row] + share * noise[row])


def test_the_network_is_asked_for_the_velocity_from_noise_to_action_or_for_the_action():
    clean, noise = torch.randn(2, 3, 10, generator=torch.Generator().manual_seed(0))
    for prediction, wanted in (("velocity", clean - noise), ("sample", clean)):
        flow = FlowMatching(prediction=prediction)
        target = flow.target(clean, noise, torch.tensor([0.0, 50.0, 100.0]))
        assert torch.equal(target, wanted) and flow.error(wanted, target).abs().max() == 0
        torch.testing.assert_close(flow.error(wanted + 0.5, target), torch.full((3, 10), 0.25))


@pytest.mark.parametrize("steps", [1, 3, 10, 100])
@pytest.mark.parametrize("prediction", PREDICTIONS["flow"])
def test_a_data_set_of_one_point_is_met_exactly(prediction, steps):
    """Its velocity at x is (point - x) / (time left), which leads straight to the point."""
    flow, point = FlowMatching(prediction=prediction), torch.linspace(-1, 1, 10).double()
    schedule = exact(flow, steps)
    path = []

    def answer(x: torch.Tensor, index: int) -> torch.Tensor:
        path.append(x)
        return {"velocity": (point - x) / (schedule.timesteps[index].double() / 100), "sample": point}[prediction]

    end = flow.sample(answer, NOISE, schedule)
    torch.testing.assert_close(end, point.expand_as(end), atol=1e-6, rtol=0)
    for index, x in enumerate(path):  # in equal steps
        torch.testing.assert_close(x, torch.lerp(NOISE, point.expand_as(NOISE), index / steps), atol=1e-6, rtol=0)


class Mixture:
    """Ten-dimensional modes, each a Gaussian of deviation ``std``."""

    def __init__(self, modes: int, std: float) -> None:
        self.means = 0.5 * torch.randn(modes, 10, generator=torch.Generator().manual_seed(1)).double()
        self.std = std

    def velocity(self, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        """The mean of ``action - noise`` given ``x = time action + (1 - time) noise`` (B, 10)."""
        variance = time**2 * self.std**2 + (1 - time) ** 2
        offset = x.unsqueeze(1) - time * self.means  # (B, modes, 10)
        share = torch.softmax(-offset.square().sum(-1) / (2 * variance), -1).unsqueeze(-1)
        action = self.means + time * self.std**2 / variance * offset
        noise = (1 - time) / variance * offset
        return (share * (action - noise)).sum(1)


def draw(target: Mixture, steps: int, guide: Guide | None = None, prediction: str = "velocity") -> torch.Tensor:
    flow = FlowMatching(prediction=prediction)
    schedule = exact(flow, steps)

    def answer(x: torch.Tensor, index: int) -> torch.Tensor:
        left = schedule.timesteps[index].double() / 100
        velocity = target.velocity(x, 1 - left)
        return {"velocity": velocity, "sample": x + left * velocity}[prediction]

    return flow.sample(answer, NOISE, schedule, guide)


def test_one_denoiser_gives_the_same_samples_whatever_it_is_asked_for():
    target = Mixture(3, 0.05)
    torch.testing.assert_close(draw(target, 10, prediction="sample"), draw(target, 10), atol=1e-6, rtol=0)


@pytest.mark.parametrize("modes, std", [(1, 0.3), (3, 0.05), (8, 0.1)])
def test_samples_of_a_mixture_converge_with_the_number_of_steps(modes, std):
    target = Mixture(modes, std)
    many = draw(target, 100)
    errors = [(draw(target, steps) - many).abs().mean().item() for steps in (4, 10, 25, 50)]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.3 * errors[0]
    distance, nearest = torch.cdist(many, target.means).min(dim=1)
    assert distance.mean() == pytest.approx(std * 10**0.5, rel=0.15)  # modes have their width
    shares = nearest.bincount(minlength=modes) / len(many)
    assert (shares - 1 / modes).abs().max() < 0.12  # and their weight


@pytest.mark.parametrize("prediction", PREDICTIONS["flow"])
def test_a_guide_of_weight_one_is_met_exactly_and_of_weight_zero_changes_nothing(prediction):
    target, wanted = Mixture(3, 0.05), torch.full((512, 10), 0.2).double()
    weight = torch.cat([torch.ones(5), torch.zeros(5)]).double()
    guided = draw(target, 10, Guide(wanted, weight), prediction)
    torch.testing.assert_close(guided[:, :5], wanted[:, :5], atol=1e-9, rtol=0)
    unguided = draw(target, 10, Guide(wanted, torch.zeros_like(weight)), prediction)
    torch.testing.assert_close(unguided, draw(target, 10, prediction=prediction), atol=1e-12, rtol=0)


def test_bad_schedules_are_named():
    flow = FlowMatching(100, 10)
    assert flow.schedule() is flow.schedule(10, "euler")
    for steps in (0, 101, 2.0, True):
        with pytest.raises(ValueError, match="denoising steps asked for; wanted 1 to 100"):
            flow.schedule(steps)
    with pytest.raises(ValueError, match="sampler 'ddim' is not one of the objective 'flow'.*choose from euler"):
        flow.schedule(10, "ddim")
