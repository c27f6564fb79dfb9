"""Sampling: cached as uncached, the samplers as diffusers has them, few steps of the one near many of the other."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from safetensors.torch import load_file

from apt.model.experts.base import RobotState
from apt.model.objectives.base import Guide, Schedule
from apt.model.objectives.diffusion import Diffusion
from benchmarks.uncached_denoise import uncached_predict
from scripts.golden_expert import features_from_golden, load_expert
from tests.conftest import GOLDEN


@pytest.fixture(scope="module")
def golden() -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / "action_expert" / "inputs.safetensors")


def golden_robot(inputs: dict[str, torch.Tensor]) -> RobotState:
    names = ("current_ee_pose", "action_ref_pose", "history_ee_states", "valid_ee_mask")
    return RobotState(*(inputs[name] for name in names))


@pytest.mark.parametrize("stage", [0, 1])
def test_the_cached_loop_equals_the_joint_pass_over_all_tokens_at_every_step(golden, stage):
    expert, _ = load_expert(GOLDEN / "action_expert", stage)
    features, robot, noise = features_from_golden(golden), golden_robot(golden), golden["draw.noise"]
    expected = load_file(GOLDEN / "action_expert" / f"stage{stage}_expected.safetensors")["infer.future_ee_states"]
    with torch.no_grad():
        cached = expert.predict(features, robot, noise)
        uncached = uncached_predict(expert, features, robot, noise)
    valid = robot.valid_ee[:, None, :, None].expand_as(cached)  # nobody reads what invalid arms predict
    scale = expected.abs().max()  # random weights reach metres far
    assert (cached - uncached)[valid].abs().max() < 1e-5 * scale
    assert (uncached - expected)[valid].abs().max() < 1e-3 * scale


@pytest.mark.parametrize("stage", [0, 1])
def test_several_samples_share_what_precedes_denoising(golden, stage):
    expert, _ = load_expert(GOLDEN / "action_expert", stage)
    features, robot, noise = features_from_golden(golden), golden_robot(golden), golden["draw.noise"]
    other = torch.randn(noise.shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        both = expert.predict(features, robot, torch.stack([noise, other], 1).flatten(0, 1), steps=3)
        each = [expert.predict(features, robot, draws, steps=3) for draws in (noise, other)]
    torch.testing.assert_close(both.unflatten(0, (-1, 2)), torch.stack(each, 1), atol=1e-5, rtol=0)


# Exact noise of a mixture of Gaussians stands for a well trained policy of several modes.


class Mixture:
    """Ten-dimensional modes, each a Gaussian of deviation ``std``."""

    def __init__(self, diffusion: Diffusion, modes: int, std: float) -> None:
        self.means = 0.5 * torch.randn(modes, 10, generator=torch.Generator().manual_seed(1)).double()
        self.std = std
        self._alphas = diffusion._scheduler.alphas_cumprod.double()

    def noise(self, x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        """The expected noise in ``x`` (B, 10)."""
        alpha = self._alphas[timestep]
        variance = alpha * self.std**2 + 1 - alpha
        offset = x.unsqueeze(1) - alpha.sqrt() * self.means  # (B, modes, 10)
        share = torch.softmax(-offset.square().sum(-1) / (2 * variance), -1)
        return (1 - alpha).sqrt() * (share.unsqueeze(-1) * offset).sum(1) / variance


def draw(diffusion: Diffusion, target: Mixture, steps: int, sampler: str, noise: torch.Tensor, guide=None):
    schedule = diffusion.schedule(steps, sampler)
    exact = Schedule(schedule.timesteps, schedule.coefficients.double())
    return diffusion.sample(lambda x, i: target.noise(x, exact.timesteps[i]), noise, exact, guide)


NOISE = torch.randn(256, 10, generator=torch.Generator().manual_seed(0)).double()


@pytest.mark.parametrize("steps", [1, 2, 3, 10, 20, 99, 100])
@pytest.mark.parametrize("sampler", Diffusion.samplers)
def test_samplers_take_the_steps_that_diffusers_takes(sampler, steps):
    diffusion = Diffusion()
    target = Mixture(diffusion, 3, 0.1)
    schedule = diffusion.schedule(steps, sampler)
    config = diffusion._scheduler.config
    if sampler == "ddim":
        library = DDIMScheduler.from_config(config)
        library.set_timesteps(steps)
        assert torch.equal(library.timesteps, schedule.timesteps)
    else:
        # Below 15 steps diffusers takes the last one at first order of itself; it is told to beyond.
        library = DPMSolverMultistepScheduler.from_config(
            config, algorithm_type="dpmsolver++", solver_order=2, euler_at_final=True
        )
        library.set_timesteps(timesteps=schedule.timesteps.tolist())
    x = NOISE.float()
    for timestep in library.timesteps:
        x = library.step(target.noise(x.double(), timestep).float(), timestep, x).prev_sample
    torch.testing.assert_close(draw(diffusion, target, steps, sampler, NOISE).float(), x, atol=3e-4, rtol=1e-3)


@pytest.mark.parametrize("modes, std", [(1, 0.3), (3, 0.05), (8, 0.1)])
@pytest.mark.parametrize("steps", [8, 10])
def test_few_steps_of_dpm_come_closer_to_many_of_ddim_than_ddim_itself(modes, std, steps):
    diffusion = Diffusion()
    target = Mixture(diffusion, modes, std)
    many = draw(diffusion, target, 100, "ddim", NOISE)
    error = {
        sampler: (draw(diffusion, target, steps, sampler, NOISE) - many).abs().mean() for sampler in Diffusion.samplers
    }
    ten = (draw(diffusion, target, 10, "ddim", NOISE) - many).abs().mean()
    assert error["dpm"] < 0.8 * min(error["ddim"], ten)


def test_a_schedule_is_made_once_and_bad_ones_are_named():
    diffusion = Diffusion()
    assert diffusion.schedule(7, "dpm") is diffusion.schedule(7, "dpm")
    assert diffusion.schedule() is diffusion.schedule(20)
    for steps in (0, 101, 2.0, True):
        with pytest.raises(ValueError, match="denoising steps asked for; wanted 1 to 100"):
            diffusion.schedule(steps)
    with pytest.raises(ValueError, match="sampler 'euler' is not one of the objective 'ddim'.*choose from ddim, dpm"):
        diffusion.schedule(10, "euler")


@pytest.mark.parametrize("sampler", Diffusion.samplers)
def test_a_guide_of_weight_one_is_met_exactly_and_of_weight_zero_changes_nothing(sampler):
    diffusion = Diffusion()
    target = Mixture(diffusion, 3, 0.05)
    wanted = torch.full((256, 10), 0.2).double()
    weight = torch.cat([torch.ones(5), torch.zeros(5)]).double()
    guided = draw(diffusion, target, 10, sampler, NOISE, Guide(wanted, weight))
    torch.testing.assert_close(guided[:, :5], wanted[:, :5], atol=1e-9, rtol=0)
    free = draw(diffusion, target, 10, sampler, NOISE)
    unguided = draw(diffusion, target, 10, sampler, NOISE, Guide(wanted, torch.zeros_like(weight)))
    torch.testing.assert_close(unguided, free, atol=1e-12, rtol=0)
