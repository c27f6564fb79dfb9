"""The learning rate over a run."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from apt.configs import TrainConfig
from train_utils.errors import ConfigError
from train_utils.optim import set_learning_rate


def rates(steps: int, warmup: int, decay: int) -> list[float]:
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    optimizer.param_groups[0]["max_lr"] = 2.0
    found = []
    for step in range(steps):
        set_learning_rate(optimizer, step, warmup, decay, steps - 1)
        found.append(optimizer.param_groups[0]["lr"])
    return found


def test_it_rises_stays_and_falls_to_nearly_nothing():
    assert rates(8, 2, 4) == [1.0, 2.0, 2.0, 2.0, 2.0, 1.5, 1.0, 0.5]
    assert rates(4, 0, 0) == [2.0] * 4


@given(steps=st.integers(1, 40), warmup=st.integers(0, 50), decay=st.integers(0, 50))
def test_it_is_never_above_the_greatest_nor_nothing_before_the_end(steps, warmup, decay):
    assert all(0 < rate <= 2.0 for rate in rates(steps, warmup, decay))


def test_a_negative_decay_is_refused():
    with pytest.raises(ConfigError, match="num_decay is -1; it must not be negative"):
        TrainConfig(num_decay=-1)
