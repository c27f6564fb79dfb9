"""Sampling: cached as uncached, the samplers as diffusers has them, few steps of the one near many of the other."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from safetensors.torch import load_file

from apt.model.experts.base import RobotState
from apt.model.objectives.base import Guide, Schedule
from apt.model.objectives.diffusion import Diffusion
from apt.model.objectives.registry import PREDICTIONS
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


@pytest.mark.parametrize("prediction", PREDICTIONS["ddim"])
def test_the_cached_loop_of_scaled_actions_equals_the_joint_pass_too(golden, prediction):
    released, _ = load_expert(GOLDEN / "action_expert", 1)
    scaled = dataclasses.replace(released.config, prediction=prediction, action_scale=(0.2, 0.5, 2.0))
    expert = type(released)(scaled).eval()
    expert.load_state_dict(released.state_dict())
    features, robot, noise = features_from_golden(golden), golden_robot(golden), golden["draw.noise"]
    with torch.no_grad():
        cached = expert.predict(features, robot, noise)
        uncached = uncached_predict(expert, features, robot, noise)
    valid = robot.valid_ee[:, None, :, None].expand_as(cached)
    assert (cached - uncached)[valid].abs().max() < 1e-5 * cached[valid].abs().max()


@pytest.mark.parametrize("stage", [0, 1])
def test_several_samples_share_what_precedes_denoising(golden, stage):
    expert, _ = load_expert(GOLDEN / "action_expert", stage)
    features, robot, noise = features_from_golden(golden), golden_robot(golden), golden["draw.noise"]
    other = torch.randn(noise.shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        both = expert.predict(features, robot, torch.stack([noise, other], 1).flatten(0, 1), steps=3)
        each = [expert.predict(features, robot, draws, steps=3) for draws in (noise, other)]
    torch.testing.assert_close(both.unflatten(0, (-1, 2)), torch.stack(each, 1), atol=1e-5, rtol=0)


# The exact answer of a mixture of Gaussians stands for a well trained policy of several modes.


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

    def answer(self, x: torch.Tensor, timestep: torch.Tensor, prediction: str) -> torch.Tensor:
        """What a network that predicts so would say of ``x`` (B, 10)."""
        alpha, noise = self._alphas[timestep], self.noise(x, timestep)
        clean = (x - (1 - alpha).sqrt() * noise) / alpha.sqrt()
        velocity = alpha.sqrt() * noise - (1 - alpha).sqrt() * clean
        return {"epsilon": noise, "sample": clean, "v_prediction": velocity}[prediction]


def draw(diffusion: Diffusion, target: Mixture, steps: int, sampler: str, noise: torch.Tensor, guide=None):
    schedule = diffusion.schedule(steps, sampler)
    exact = Schedule(schedule.timesteps, schedule.coefficients.double())
    return diffusion.sample(
        lambda x, i: target.answer(x, exact.timesteps[i], diffusion.prediction), noise, exact, guide
    )


NOISE = torch.randn(256, 10, generator=torch.Generator().manual_seed(0)).double()


@pytest.mark.parametrize("steps", [1, 2, 3, 10, 20, 99, 100])
@pytest.mark.parametrize("sampler", Diffusion.samplers)
@pytest.mark.parametrize("prediction", PREDICTIONS["ddim"])
def test_samplers_take_the_steps_that_diffusers_takes(prediction, sampler, steps):
    diffusion = Diffusion(prediction=prediction)
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
        x = library.step(target.answer(x.double(), timestep, prediction).float(), timestep, x).prev_sample
    torch.testing.assert_close(draw(diffusion, target, steps, sampler, NOISE).float(), x, atol=3e-4, rtol=1e-3)


@pytest.mark.parametrize("prediction", PREDICTIONS["ddim"])
def test_the_network_is_asked_for_what_diffusers_calls_so(prediction):
    diffusion = Diffusion(prediction=prediction)
    clean, noise = torch.randn(2, 100, 4, 10, generator=torch.Generator().manual_seed(0))
    timestep = torch.arange(100)
    target = diffusion.target(clean, noise, timestep)
    assert diffusion.error(target, target).abs().max() == 0
    torch.testing.assert_close(diffusion.error(target - 0.5, target), torch.full((100, 4, 10), 0.5))
    x, library = diffusion.add_noise(clean, noise, timestep), DDIMScheduler.from_config(diffusion._scheduler.config)
    library.set_timesteps(100)
    for step in (0, 50, 90):
        back = library.step(target[step], step, x[step]).pred_original_sample
        torch.testing.assert_close(back, clean[step], atol=1e-4, rtol=0)


@pytest.mark.parametrize("sampler", Diffusion.samplers)
def test_one_denoiser_gives_the_same_samples_whatever_it_is_asked_for(sampler):
    draws = []
    for prediction in PREDICTIONS["ddim"]:
        diffusion = Diffusion(prediction=prediction)
        draws.append(draw(diffusion, Mixture(diffusion, 3, 0.1), 10, sampler, NOISE))
    for other in draws[1:]:
        torch.testing.assert_close(other, draws[0], atol=1e-3, rtol=0)


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
@pytest.mark.parametrize("prediction", PREDICTIONS["ddim"])
def test_a_guide_of_weight_one_is_met_exactly_and_of_weight_zero_changes_nothing(prediction, sampler):
    diffusion = Diffusion(prediction=prediction)
    target = Mixture(diffusion, 3, 0.05)
    wanted = torch.full((256, 10), 0.2).double()
    weight = torch.cat([torch.ones(5), torch.zeros(5)]).double()
    guided = draw(diffusion, target, 10, sampler, NOISE, Guide(wanted, weight))
    torch.testing.assert_close(guided[:, :5], wanted[:, :5], atol=1e-9, rtol=0)
    free = draw(diffusion, target, 10, sampler, NOISE)
    unguided = draw(diffusion, target, 10, sampler, NOISE, Guide(wanted, torch.zeros_like(weight)))
    torch.testing.assert_close(unguided, free, atol=1e-12, rtol=0)
