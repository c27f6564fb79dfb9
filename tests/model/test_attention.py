"""One attention function, whichever library computes it."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from apt.model.experts.config import check_attention_backend
from apt.model.layers.attention import AttentionMask, attention, trainable_on_cpu
from apt.model.layers.positions import PoseEncoding, RotaryEncoding
from apt.model.layers.rotations import invert_transform
from tests.model.test_action_transform import random_poses


def qkv(generator: torch.Generator, length: int = 6) -> list[torch.Tensor]:
    return [torch.randn(2, length, 3, 16, generator=generator) for _ in range(3)]


def test_a_query_that_may_see_nothing_gets_zero_and_a_finite_gradient():
    q, k, v = (x.requires_grad_() for x in qkv(torch.Generator().manual_seed(0)))
    mask = torch.ones(2, 6, 6, dtype=torch.bool)
    mask[0, 2] = False
    out = attention(q, k, v, AttentionMask.of(mask, q.dtype))
    assert (out[0, 2] == 0).all() and (out[0, 1] != 0).any()
    out.sum().backward()
    assert all(torch.isfinite(x.grad).all() for x in (q, k, v))


def test_masked_keys_do_not_matter():
    q, k, v = qkv(torch.Generator().manual_seed(0))
    mask = torch.rand(2, 1, 6, generator=torch.Generator().manual_seed(1)).expand(2, 6, 6) < 0.6
    mask[..., 0] = True
    before = attention(q, k, v, AttentionMask.of(mask, q.dtype))
    hidden = ~mask[:, 0]
    k[hidden], v[hidden] = 100.0, -100.0
    assert torch.equal(before, attention(q, k, v, AttentionMask.of(mask, q.dtype)))


def test_what_trains_on_a_cpu_answers_and_learns_as_the_kernel_does():
    generator = torch.Generator().manual_seed(0)
    leaves = [torch.randn(2, 3, length, 16, generator=generator).requires_grad_() for length in (5, 6, 6)]
    hidden = torch.rand(2, 1, 1, 6, generator=generator) < 0.4
    for bias in (None, torch.zeros(2, 1, 1, 6).masked_fill(hidden, float("-inf"))):
        found = []
        for way in (trainable_on_cpu, torch.nn.functional.scaled_dot_product_attention):
            out = way(*leaves, bias)
            found.append((out, *torch.autograd.grad(out.square().sum(), leaves)))
        torch.testing.assert_close(*found, atol=1e-5, rtol=1e-4)


def attend(encoding, generator: torch.Generator) -> torch.Tensor:
    q, k, v = encoding.encode(*qkv(generator))
    return encoding.decode(attention(q, k, v))


def test_pose_encoding_sees_relative_poses_alone():
    generator = torch.Generator().manual_seed(0)
    poses, moved = random_poses((2, 6), generator, 0.5), random_poses((2, 1), generator, 0.5)
    outs = [
        attend(PoseEncoding(p, invert_transform(p)), torch.Generator().manual_seed(1)) for p in (poses, moved @ poses)
    ]
    torch.testing.assert_close(*outs, atol=1e-4, rtol=1e-4)
    other = random_poses((2, 6), generator, 0.5)
    assert (
        attend(PoseEncoding(other, invert_transform(other)), torch.Generator().manual_seed(1)) - outs[0]
    ).abs().max() > 0.01


def test_rotary_encoding_sees_relative_positions_alone_in_the_second_half():
    positions = torch.arange(6).expand(2, 6)
    outs = [attend(RotaryEncoding.at(p, 16), torch.Generator().manual_seed(1)) for p in (positions, positions + 11)]
    torch.testing.assert_close(*outs, atol=1e-5, rtol=1e-5)
    q, k, _ = qkv(torch.Generator().manual_seed(2))
    turned, _, _ = RotaryEncoding.at(positions, 16).encode(q, k, k)
    assert torch.equal(turned[..., :8], q[..., :8]) and not torch.equal(turned[:, 1:, :, 8:], q[:, 1:, :, 8:])


def test_unknown_backends_are_named():
    with pytest.raises(ValueError, match="flash9.*sdpa, xformers"):
        check_attention_backend("flash9")


@pytest.mark.skipif(importlib.util.find_spec("xformers") is not None, reason="xformers is installed here")
def test_a_missing_backend_says_what_to_install():
    with pytest.raises(ImportError, match="pip install xformers"):
        check_attention_backend("xformers")


@pytest.mark.gpu
def test_xformers_equals_sdpa():
    pytest.importorskip("xformers")
    q, k, v = (x.cuda() for x in qkv(torch.Generator().manual_seed(0)))
    mask = torch.rand(2, 6, 6, generator=torch.Generator().manual_seed(1)).cuda() < 0.5
    mask = AttentionMask.of(mask, q.dtype)
    torch.testing.assert_close(attention(q, k, v, mask, "xformers"), attention(q, k, v, mask), atol=1e-4, rtol=1e-4)
