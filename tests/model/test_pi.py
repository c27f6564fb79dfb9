"""The pi-style expert's bond with the VLM: the keys, values and positions of Hugging Face's own model."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from apt.model.encoders.hub import load_model
from apt.model.experts.config import VLMAttention
from apt.model.experts.context import KeysValues
from apt.model.experts.pi import PiBlock, Rotary
from apt.model.layers.attention import AttentionMask, attention
from apt.model.layers.positions import rotate
from apt.model.vla import VLA, robot_state
from tests.model.helpers import build, make_batch, make_observation, run_hugging_face

PROMPTS = ["pick up the can", "go"]


@pytest.fixture(scope="module")
def model() -> VLA:
    return build(1, arch="pi")


def test_keys_and_values_are_those_in_hugging_faces_cache(model):
    observation = make_observation(model.vlm, PROMPTS, hidden=[(1, 0)])
    reference, cache = load_model("tiny", torch.float32).eval(), DynamicCache()
    run_hugging_face(reference, observation, past_key_values=cache, use_cache=True)
    features, valid = model.vlm(observation), observation.attention_mask
    assert list(features.keys_values) == [0, 1, 2, 3]
    for layer, found in features.keys_values.items():
        wanted = cache.layers[layer].keys, cache.layers[layer].values  # (B, key-value heads, L, d)
        for ours, theirs in zip(found, wanted, strict=True):
            torch.testing.assert_close(ours[valid], theirs.transpose(1, 2)[valid], atol=2e-4, rtol=1e-4)


def test_action_tokens_have_the_rotary_positions_of_text_behind_the_prompt(model):
    """Theirs are found by letting Hugging Face's model count on: its own positions of a longer text."""
    batch = make_batch(model.vlm, PROMPTS, arms=2)
    observation, reference = batch.observation, load_model("tiny", torch.float32).model
    steps = model.expert.steps_per_arm
    words = torch.full((len(PROMPTS), steps), model.vlm.prompt_tokenizer((64, 64)).pad_id)
    ids = torch.cat([observation.input_ids, words], dim=1)
    rows, columns = (side // reference.config.vision_config.patch_size for side in (64, 64))
    positions, _ = reference.get_rope_index(
        ids,
        mm_token_type_ids=(ids == reference.config.image_token_id).int(),
        image_grid_thw=torch.tensor([[1, rows, columns]] * len(observation.image_index)),
        attention_mask=torch.cat([observation.attention_mask, torch.ones_like(words).bool()], dim=1).long(),
    )
    cos, sin = reference.language_model.rotary_emb(torch.zeros(1), positions)
    rotary = model.expert.encode_vl(model.vlm(observation), robot_state(observation)).rotary
    for ours, theirs in ((rotary.cos, cos), (rotary.sin, sin)):
        for arm in ours.squeeze(2).split(steps, dim=1):
            torch.testing.assert_close(arm, theirs[:, -steps:], atol=1e-5, rtol=0)


@pytest.mark.parametrize("stage", [0, 1])
def test_actions_stand_right_behind_the_last_token(stage):
    model = build(stage, arch="pi")
    observation = make_observation(model.vlm, PROMPTS, hidden=[(1, 0)])
    end = model.vlm(observation).rotary_end
    for row, attended in enumerate(observation.attention_mask):
        assert end[row] == observation.position_ids[:, row, attended].max() + 1


def test_grouped_queries_equal_repeated_keys():
    """Hugging Face's way: query head h reads key h // groups, which is there once for each of them."""
    torch.manual_seed(0)
    shape, width, tokens = VLMAttention(heads=6, kv_heads=2, head_dim=8, rope_theta=1e4), 24, 5
    block = PiBlock(width, shape, "sdpa")
    x, modulation = torch.randn(3, tokens, width), torch.randn(1, 4, width)
    context = KeysValues(*torch.randn(2, 3, 7, shape.kv_heads, shape.head_dim))
    mask = AttentionMask.of(torch.rand(3, 1, 7 + tokens) < 0.7, torch.float32)
    rotary = Rotary.at(torch.arange(7, 7 + tokens).expand(3, -1), shape)

    factor1, offset1, factor2, offset2 = modulation.unsqueeze(2).unbind(1)
    normed = block.norm1(x, factor1, offset1)
    q = block.q_norm(block.to_q(normed).view(3, tokens, shape.heads, -1))
    k, v = block.to_kv(normed).view(3, tokens, 2, shape.kv_heads, -1).unbind(2)
    q, k = (rotate(each, rotary.cos, rotary.sin) for each in (q, block.k_norm(k)))
    repeated = (each.repeat_interleave(shape.heads // shape.kv_heads, dim=2) for each in context.joined(k, v))
    wanted = x + block.to_out(attention(q, *repeated, mask).flatten(2))
    wanted = wanted + block.mlp(block.norm2(wanted, factor2, offset2))
    torch.testing.assert_close(block(x, context, modulation, rotary, mask), wanted, atol=1e-5, rtol=1e-5)
