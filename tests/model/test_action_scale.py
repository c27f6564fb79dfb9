"""Scaled actions: where the network meets them, where metres stay, and what comes out."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from apt.model.action_scale import full_scale, scale_words
from apt.model.config import VLAConfig, meaning
from apt.model.objectives.base import Guide
from apt.model.objectives.registry import PREDICTIONS
from apt.model.vla import VLA, robot_state
from data_utils.types import Batch
from tests.model.helpers import SMALL, build, fixed_noise, make_batch

SCALE = (0.2, 0.5, 2.0)
KINDS = [(objective, prediction) for objective in PREDICTIONS for prediction in PREDICTIONS[objective]]


def answering(model: VLA, wanted: torch.Tensor, monkeypatch) -> list[torch.Tensor]:
    """Have the network answer as one that knows that the clean scaled actions are ``wanted``; what it is asked."""
    expert, objective, asked = model.expert, model.expert.objective, []

    def denoise(context, noisy, modulations):
        timestep = objective.schedule(4).timesteps[len(asked)].expand(len(noisy))
        asked.append(noisy)
        nothing = torch.zeros_like(noisy)
        share = objective.add_noise(nothing, torch.ones_like(noisy), timestep)  # of noise
        noise = (noisy - objective.add_noise(wanted, nothing, timestep)) / share
        return objective.target(wanted, noise, timestep)

    monkeypatch.setattr(expert, "denoise", denoise)
    return asked


def recorded(model: VLA, batch: Batch) -> torch.Tensor:
    """The recorded future as actions, not scaled: (B, Nee, Ta, 10). No choice of the world's frame changes them."""
    return model.expert.encode_states(batch.future, robot_state(batch.observation))


@pytest.mark.parametrize("objective, prediction", KINDS)
def test_a_network_that_knows_the_recorded_motion_gives_it_back_in_metres(objective, prediction, monkeypatch):
    model = build(1, objective=objective, prediction=prediction, action_scale=SCALE)
    batch = make_batch(model.vlm, ["go", "pick up the can"], arms=2)
    wanted = recorded(model, batch) / model.expert.action_scale
    asked = answering(model, wanted, monkeypatch)
    noise = fixed_noise(batch)
    states = model.predict(batch.observation, noise, steps=4)
    torch.testing.assert_close(states, batch.future, atol=2e-4, rtol=0)
    assert torch.equal(asked[0], noise)  # of deviation 1 in scaled numbers
    metres = Guide(recorded(model, batch) + 0.1, torch.ones(1))
    asked.clear()
    expert, run = model.expert, model.expert.sampling_run(4)
    prefix = expert.encode_prefix(model.vlm(batch.observation), robot_state(batch.observation))
    drawn = expert.sample(prefix.context, noise, run, metres) * expert.action_scale
    torch.testing.assert_close(drawn, metres.target, atol=1e-5, rtol=0)


@torch.no_grad()
def test_noisy_tokens_are_placed_in_metres_and_history_is_not_scaled():
    seen: dict[str, list[torch.Tensor]] = {}
    for scale in (None, SCALE):
        model = build(1, action_scale=scale)
        batch = make_batch(model.vlm, ["go"], arms=1)
        inputs = seen[str(scale)] = []
        for module in (model.expert.history_mlp, model.expert.position_mlp, model.expert.action_mlp):
            module.register_forward_pre_hook(lambda _, args, inputs=inputs: inputs.append(args[0]))
        model.predict(batch.observation, fixed_noise(batch), steps=1)
    # In the order of the calls: history, its positions; the noisy future, its positions.
    released, scaled = seen["None"], seen[str(SCALE)]
    assert torch.equal(released[0], scaled[0]) and torch.equal(released[1], scaled[1])
    assert torch.equal(released[2], scaled[2])  # the network's inputs are the scaled numbers themselves
    centre = released[3] - released[2][..., :3]
    torch.testing.assert_close(scaled[3], centre + 0.2 * scaled[2][..., :3])


@pytest.mark.parametrize("objective", PREDICTIONS)
def test_the_loss_is_on_scaled_numbers(objective):
    model = build(1, objective=objective, prediction="sample", action_scale=SCALE)
    batch = make_batch(model.vlm, ["go", "pick up the can"])
    with torch.no_grad():
        model.expert.action_head.weight.zero_()
        model.expert.action_head.bias.zero_()
        loss = model(batch, torch.Generator().manual_seed(0))
    metres = recorded(model, batch)
    power = {"ddim": 1, "flow": 2}[objective]
    for part, scale, numbers in (("translation", 0.2, slice(0, 3)), ("gripper", 2.0, slice(9, 10))):
        expected = (metres[..., numbers] / scale).abs().pow(power).mean()
        torch.testing.assert_close(getattr(loss, part), expected, atol=1e-5, rtol=1e-5)


def test_a_scale_of_ones_is_as_released_to_the_bit():
    losses = []
    for changes in ({}, {"action_scale": (1.0, 1.0, 1.0)}, {"action_scale": (1.0,) * 10, "prediction": "epsilon"}):
        model = build(1, **changes)
        batch = make_batch(model.vlm, ["go"])
        loss = model(batch, torch.Generator().manual_seed(0)).total.item()
        losses.append((loss, model.predict(batch.observation, fixed_noise(batch), 2)))
    assert all(loss == losses[0][0] and torch.equal(states, losses[0][1]) for loss, states in losses[1:])
    assert "action_scale" not in model.state_dict().keys() | model.released_weights().keys()


def test_three_numbers_stand_for_the_parts_and_words_are_as_few_as_say_it():
    assert full_scale((0.1, 0.3, 1)) == (0.1,) * 3 + (0.3,) * 6 + (1.0,)
    assert full_scale(None) == (1.0,) * 10 and full_scale(range(1, 11)) == tuple(map(float, range(1, 11)))
    assert scale_words(full_scale((0.1, 0.3, 1))) == "0.1 0.3 1" == scale_words([0.1, 0.3, 1.0])
    assert scale_words(None) == scale_words((1, 1, 1)) == "None"
    assert scale_words(range(1, 11)) == "1 2 3 4 5 6 7 8 9 10"
    for wrong, named in (
        ((1.0,), "is 1.0;"), ((0.1, 0.3, 0), "is 0.1 0.3 0;"), ("0.1", "is 0.1;"), (0.1, "is 0.1;"),
        ((0.1, float("inf"), 1.0), "inf"), ((0.1, True, 1.0), "True"), (("a", "b", "c"), "a b c"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"action_scale .*{named}.* wanted 3 positive numbers"):
            full_scale(wrong)


def test_what_an_objective_cannot_predict_is_refused_before_anything_is_built():
    for changes, named in (
        ({"prediction": "velocity"}, "prediction 'velocity' is not one of the objective 'ddim'; choose from epsilon, "),
        ({"prediction": "epsilon", "objective": "flow"}, "'epsilon' is not one of the objective 'flow'; choose from"),
        ({"objective": "gan"}, "unknown objective 'gan'; choose from ddim, flow"),
        ({"action_scale": (0.1,)}, "action_scale is 0.1; wanted 3 positive numbers"),
    ):
        for build_config in (VLAConfig, lambda **fields: dataclasses.replace(SMALL, **fields)):
            with pytest.raises(ValueError, match=named):
                build_config(**changes)


def test_configurations_without_the_fields_mean_what_released_models_do():
    released = {
        "objective": "ddim", "prediction": "epsilon", "action_scale": "None", "action_step_embedding": "False"
    }  # fmt: skip
    assert meaning({}) == released == meaning(dataclasses.asdict(VLAConfig()))
    assert meaning({"objective": "flow"})["prediction"] == "velocity"
    assert meaning({"action_scale": [0.1, 0.3, 1.0]})["action_scale"] == "0.1 0.3 1"
