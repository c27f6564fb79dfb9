"""What every architecture and objective must do, whatever it is made of: the same tests for all of them."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

from apt.model.action_transform import action_to_state
from apt.model.encoders.hub import VLM_MODES
from apt.model.experts.base import TrainingDraws, recentre, recentring_transform, transform_states
from apt.model.experts.registry import ARCHITECTURES
from apt.model.layers.rotations import invert_transform
from apt.model.objectives.registry import OBJECTIVES
from apt.model.vla import VLA, robot_state
from data_utils.types import Batch, Observation
from tests.model import helpers
from tests.model.helpers import build, fixed_noise

PROMPTS = (["go", "go"], ["pick up the cereal box and put it into the small bin", "no"])


@dataclasses.dataclass(frozen=True)
class Kind:
    arch: str
    objective: str

    def __str__(self) -> str:
        return f"{self.arch}-{self.objective}"

    def build(self, stage: int, **changes) -> VLA:
        """One of its own, to change as one likes."""
        return build(stage, arch=self.arch, objective=self.objective, **changes)

    @functools.cache  # noqa: B019 - a handful of tiny models
    def policy(self, stage: int) -> VLA:
        """One for all tests that leave it as it is."""
        return self.build(stage)


KINDS = [Kind(arch, objective) for arch in ARCHITECTURES for objective in OBJECTIVES]


@pytest.fixture(params=KINDS, ids=str)
def kind(request) -> Kind:
    return request.param


def make_batch(model: VLA, prompts: Sequence[str], **options) -> Batch:
    """Of small pictures, 2 x 3 tokens: there are many tests here."""
    return helpers.make_batch(model.vlm, list(prompts), hw=(32, 48), **options)


def predict(model: VLA, batch: Batch, noise: torch.Tensor | None = None, steps: int = 2) -> torch.Tensor:
    return model.predict(batch.observation, fixed_noise(batch) if noise is None else noise, steps)


# -- shapes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", [0, 1])
def test_a_prediction_has_a_state_for_every_sample_step_and_arm(kind, stage):
    model = kind.policy(stage)
    for arms in (1, 2):
        batch = make_batch(model, ["go", "pick up the can"], arms=arms)
        noise = fixed_noise(batch, samples=2)
        states = predict(model, batch, noise)
        assert states.shape == (2 * 2, 8, arms, 17) and states.isfinite().all()
        rotation = states[..., :16].unflatten(-1, (4, 4))[..., :3, :3]
        torch.testing.assert_close(rotation @ rotation.mT, torch.eye(3).expand_as(rotation), atol=1e-3, rtol=0)
    apart = [predict(model, batch, noise[draw::2]) for draw in range(2)]  # samples share what comes before
    torch.testing.assert_close(states.unflatten(0, (2, 2)), torch.stack(apart, 1), atol=1e-4, rtol=1e-4)


def test_a_generator_decides_the_loss(kind):
    model = kind.policy(1)
    batch = make_batch(model, ["go", "go"])
    losses = [
        model(batch, torch.Generator().manual_seed(seed), pose_noise=True, camera_view_dropout=0.5).total.item()
        for seed in (1, 1, 2)
    ]
    assert losses[0] == losses[1] != losses[2]


def test_several_draws_per_observation_give_the_mean_gradient_of_as_many_passes(kind):
    """Draw by draw the same, hence the same in expectation, whatever K is; also for the VLM's gradient."""
    model = kind.build(1, vlm_mode="full" if kind.objective == "ddim" else "frozen").train()
    batch = make_batch(model, ["go", "pick up the can"], arms=2)
    batch.observation.valid_ee[1, 1] = False
    robot = robot_state(batch.observation)
    draws = model.expert.draw(robot, noise_samples=2, generator=torch.Generator().manual_seed(0))

    def gradients(some: TrainingDraws) -> tuple[torch.Tensor, list[torch.Tensor]]:
        loss = model.expert(model.vlm(batch.observation), robot, batch.future, some).total
        return loss.detach(), torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])

    total, together = gradients(draws)
    singles = [
        gradients(dataclasses.replace(draws, noise=draws.noise[k::2], timestep=draws.timestep[k::2])) for k in range(2)
    ]
    torch.testing.assert_close(total, torch.stack([loss for loss, _ in singles]).mean(), atol=1e-4, rtol=1e-5)
    for gradient, *apart in zip(together, *(found for _, found in singles), strict=True):
        scale = gradient.abs().max().clamp(min=1e-6)
        assert (gradient - torch.stack(apart).mean(0)).abs().max() / scale < 1e-4


# -- masks -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", [0, 1])
def test_a_camera_that_is_not_shown_does_not_reach_the_prediction(kind, stage):
    model = kind.policy(stage)
    batch = make_batch(model, PROMPTS[0], hidden=[(0, 1)])
    before = predict(model, batch)
    scramble_camera(batch.observation)
    assert torch.equal(before[0], predict(model, batch)[0])


def test_a_camera_that_view_dropout_hides_does_not_reach_the_prediction(kind):
    model = kind.policy(1)
    batch = make_batch(model, PROMPTS[0])
    keep, robot = torch.tensor([[True, False], [True, True]]), robot_state(batch.observation)
    before = model.expert.predict(model.vlm(batch.observation, keep), robot, fixed_noise(batch), 2)
    scramble_camera(batch.observation)
    after = model.expert.predict(model.vlm(batch.observation, keep), robot, fixed_noise(batch), 2)
    assert torch.equal(before[0], after[0])


def scramble_camera(observation: Observation) -> None:
    """Another picture from another place in the second camera of the first sample."""
    observation.rgb[0, :, 1] = 255 - observation.rgb[0, :, 1]
    observation.K[0, 1, 0, 0] *= 2
    observation.world_from_cam[0, :, 1, :3, 3] += 1.0


@pytest.mark.parametrize("stage", [0, 1])
def test_an_invalid_arm_changes_nothing_for_the_valid_one(kind, stage):
    model = kind.policy(stage)
    batch = make_batch(model, ["go", "go"], arms=2)
    observation, noise = batch.observation, fixed_noise(batch)
    observation.valid_ee[:, 1] = False
    before = predict(model, batch, noise)[:, :, 0]
    for states in (observation.history[:, :, 1, 3:12:4], observation.world_from_ee[:, 1, :3, 3]):
        states += 1.0
    observation.world_from_ref[:, 1, :3, 3] -= 1.0
    noise[:, 1] += 1.0
    assert torch.equal(before, predict(model, batch, noise)[:, :, 0])


@pytest.mark.parametrize("stage", [0, 1])
def test_neither_padding_nor_the_other_samples_of_a_batch_change_a_prediction(kind, stage):
    model = kind.policy(stage)
    batch = make_batch(model, ["go", "pick up the cereal box and put it into the small bin"], hidden=[(0, 1)])
    alone = make_batch(model, ["go"], hidden=[(0, 1)])
    assert alone.observation.input_ids.shape[1] < batch.observation.input_ids.shape[1]
    noise = fixed_noise(batch)
    torch.testing.assert_close(predict(model, batch, noise)[:1], predict(model, alone, noise[:1]), atol=2e-4, rtol=1e-4)


def test_prediction_moves_with_the_world(kind):
    """Shift every pose by the same translation: predicted poses shift along, exactly what re-centring is for."""
    model = kind.policy(1)
    batch = make_batch(model, ["go", "stay"])
    observation = batch.observation
    before = predict(model, batch)
    shift = torch.tensor([0.5, -2.0, 1.0])
    for poses in (observation.world_from_cam, observation.world_from_ee, observation.world_from_ref):
        poses[..., :3, 3] += shift
    observation.history[..., [3, 7, 11]] += shift
    after = predict(model, batch)
    after[..., [3, 7, 11]] -= shift
    torch.testing.assert_close(before, after, atol=5e-4, rtol=1e-3)


# -- the two stages ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hidden", [(), [(0, 1)]])
def test_stage1_ignores_the_prompt_to_the_bit(kind, hidden):
    model = kind.policy(0)
    first, second = (predict(model, make_batch(model, prompts, hidden=hidden)) for prompts in PROMPTS)
    assert torch.equal(first, second)


def test_stage2_follows_the_prompt(kind):
    model = kind.policy(1)
    first, second = (predict(model, make_batch(model, prompts)) for prompts in PROMPTS)
    assert (first - second).abs().amax(dim=(1, 2, 3)).min() > 1e-4


@pytest.mark.parametrize("stage", [0, 1])
def test_a_prediction_follows_the_images_the_arm_and_its_history(kind, stage):
    model = kind.policy(stage)
    batch = make_batch(model, ["go", "go"])
    before = predict(model, batch)
    for change in (
        lambda observation: observation.rgb.copy_(255 - observation.rgb),
        lambda observation: observation.world_from_ref[..., 0, 3].add_(0.1),
        lambda observation: observation.history[..., 3].add_(0.1),
    ):
        changed = make_batch(model, ["go", "go"])
        change(changed.observation)
        assert (predict(model, changed) - before).abs().amax(dim=(1, 2, 3)).min() > 1e-5


# -- sampling ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def uncached(model: VLA, batch: Batch, noise: torch.Tensor, steps: int) -> torch.Tensor:
    """Sampling by diffusers' own scheduler, everything computed again at every step."""
    expert, observation = model.expert, batch.observation
    if model.config.objective == "ddim":
        scheduler, sign = DDIMScheduler(100, beta_schedule="squaredcos_cap_v2", clip_sample=False), 1
        scheduler.set_timesteps(steps)
    else:
        scheduler, sign = FlowMatchEulerDiscreteScheduler(100), -1  # its velocity points at the noise
        scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps).tolist())
    action = noise
    for timestep in scheduler.timesteps:
        features, robot = model.vlm(observation), robot_state(observation)
        centred_from_world = recentring_transform(features)
        features, robot = recentre(features, robot, centred_from_world)
        context = expert.encode_context(features, robot)
        prediction = expert.denoise(context, action, expert.modulations(timestep.expand(len(action))))
        action = scheduler.step(sign * prediction, timestep, action).prev_sample
    states = action_to_state(action.transpose(1, 2), robot.world_from_ee[:, None], robot.world_from_ref[:, None])
    return transform_states(invert_transform(centred_from_world), states)


@pytest.mark.parametrize("stage", [0, 1])
def test_cached_sampling_equals_uncached_sampling_by_diffusers(kind, stage):
    model = kind.policy(stage)
    batch = make_batch(model, ["go", "pick up the can"], arms=2, hidden=[(1, 0)])
    wanted = uncached(model, batch, fixed_noise(batch), steps=4)
    torch.testing.assert_close(predict(model, batch, steps=4), wanted, atol=1e-4, rtol=1e-4)


def test_every_sampler_runs_and_denoising_steps_have_their_usual_number(kind):
    expert = kind.policy(1).expert
    batch = make_batch(kind.policy(1), ["go"])
    usual = {"ddim": {}, "flow": {"gr00t": 4}}[kind.objective].get(kind.arch, {"ddim": 20, "flow": 10}[kind.objective])
    assert len(expert.objective.schedule()) == usual
    for sampler in expert.objective.samplers:
        assert kind.policy(1).predict(batch.observation, fixed_noise(batch), 2, sampler=sampler).isfinite().all()
    with pytest.raises(ValueError, match="sampler 'heun' is not one of the objective .*choose from"):
        expert.sampling_run(2, "heun")


def test_half_precision_leaves_poses_alone(kind):
    model = kind.policy(1)
    batch = make_batch(model, PROMPTS[0])
    whole = predict(model, batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = predict(model, batch)
    assert half.dtype == torch.float32
    orthonormal = half[..., :16].unflatten(-1, (4, 4))[..., :3, :3]
    assert torch.allclose(orthonormal @ orthonormal.mT, torch.eye(3), atol=1e-5)
    assert (half - whole)[..., :16].abs().max() < 0.2


# -- gradients ---------------------------------------------------------------------------------------------------------

# Parameters of the tiny VLM (four layers, stride 1) that nothing which an architecture reads depends on.
UNREAD = {
    "apt": r"lm_head|language_model\.norm|layers\.3\.",
    "pi": r"lm_head|language_model\.norm|layers\.3\.(?!input_layernorm|self_attn\.(k_proj|k_norm|v_proj)\.)",
    "gr00t": r"lm_head|language_model\.norm",
    "token_insertion": r"lm_head|language_model\.norm",
}
ADAPTED = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.mark.parametrize(
    "kind, stage, mode",
    [(kind, 0, "frozen") for kind in KINDS]
    + [(kind, 1, mode) for kind in KINDS for mode in (VLM_MODES if kind.objective == "ddim" else ("full",))],
    ids=str,
)
def test_gradients_reach_what_trains_and_nothing_else(kind, stage, mode):
    """DDP waits for the gradient of every parameter that trains."""
    model = kind.build(stage, vlm_mode=mode).train()
    model(make_batch(model, ["pick it up", "go"]), generator=torch.Generator().manual_seed(0)).total.backward()
    parameters = dict(model.named_parameters())
    trained = {name for name, p in parameters.items() if p.requires_grad}
    assert {name for name, p in parameters.items() if p.grad is not None} == trained
    vlm = {name for name in trained if name.startswith("vlm.")}
    if mode == "frozen":
        assert not vlm
    elif mode == "lora":
        assert all("lora_" in name for name in vlm)
        assert {name.split(".lora_")[0].rsplit(".", 1)[1] for name in vlm} == ADAPTED
        assert all(parameters[name].grad.abs().sum() > 0 for name in vlm if "lora_B" in name)
    else:
        assert vlm == {
            name for name in parameters if name.startswith("vlm.") and not re.search(UNREAD[kind.arch], name)
        }
        assert all(
            p.grad.abs().sum() > 0 for name, p in parameters.items() if name in vlm and "k_proj.bias" not in name
        )


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_gradient_checkpointing_changes_no_gradient(arch):
    gradients = []
    for checkpointing in (False, True):
        model = build(1, arch=arch, vlm_mode="full", gradient_checkpointing=checkpointing).train()
        model(make_batch(model, ["pick it up", "go"]), torch.Generator().manual_seed(0)).total.backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed, atol=1e-5, rtol=1e-4)
