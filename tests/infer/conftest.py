"""What most tests of inference plan with: a tiny policy, a few recorded episodes."""

from __future__ import annotations

import dataclasses

import pytest

from data_utils.datasets import PickPlaceCan
from tests.infer.helpers import tiny_policy


@pytest.fixture(scope="module")
def policy():
    return tiny_policy()


@pytest.fixture
def dataset(located) -> PickPlaceCan:
    return PickPlaceCan(config=dataclasses.replace(PickPlaceCan.config, image_hw=(64, 64)), train=False)
