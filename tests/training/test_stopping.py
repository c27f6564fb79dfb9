"""When ranks that were told to stop notice it."""

from __future__ import annotations

import os
import signal

import pytest
import torch

from train_utils.backend import DDPBackend
from train_utils.stopping import StopWish


class TwoRanks:
    """What the exchange of two ranks gives on this one, the other taking ``seconds`` per step."""

    world_size, device = 2, torch.device("cpu")

    def __init__(self, seconds: float, told: bool = False) -> None:
        self.seconds, self.told, self.exchanges = seconds, told, 0

    def max(self, values: torch.Tensor) -> torch.Tensor:
        self.exchanges += 1
        return torch.maximum(values, torch.tensor([float(self.told), self.seconds]))


@pytest.mark.parametrize("seconds, steps", [(5.0, 1), (2.0, 1), (0.9, 2), (0.3, 6), (0.19, 10), (0.001, 10)])
def test_ranks_exchange_wishes_within_two_seconds_or_a_step_of_the_slowest(seconds, steps):
    wish, ranks = StopWish(), TwoRanks(seconds)
    assert not wish.agreed(ranks) and ranks.exchanges == 1  # how long a step takes is not known before
    for step in range(1, 3 * steps + 1):
        ranks.told = step == 3 * steps
        assert wish.agreed(ranks) == ranks.told
        assert ranks.exchanges == 1 + step // steps


def test_one_process_sees_its_own_signal_after_the_step_and_keeps_the_handlers_of_before():
    before, wish, alone = signal.getsignal(signal.SIGTERM), StopWish(), DDPBackend("cpu")
    with wish.catching():
        assert not wish.agreed(alone)
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)  # a job manager tells every process, and a launcher does again
        assert wish.agreed(alone)
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_second_ctrl_c_ends_the_loop_at_once():
    wish = StopWish()
    with pytest.raises(KeyboardInterrupt), wish.catching():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
