"""One service for all tests that do not end it, and a planner on the same checkpoint in this process."""

from __future__ import annotations

import dataclasses

import pytest

from apt.infer.planner import TrajPlanner
from data_utils.datasets import PickPlaceCan
from tests.conftest import one_thread
from tests.service.helpers import STEPS, connect, running_policy, write_checkpoint
from tests.transport.conftest import ns_port  # noqa: F401 (a fixture)


@pytest.fixture(scope="package", autouse=True)
def _one_thread():
    """As the service has, so that both compute the very same numbers."""
    with one_thread():
        yield


@pytest.fixture(scope="package")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("served") / "tiny")


@pytest.fixture(scope="package")
def service(checkpoint, ns_port):  # noqa: F811
    with running_policy(checkpoint, ns_port, "--status_every", "0") as process:
        yield process


@pytest.fixture
def robot(service, ns_port):  # noqa: F811
    """A client of the shared service."""
    with connect(ns_port) as proxy:
        yield proxy


@pytest.fixture(scope="package")
def policy(checkpoint):
    return TrajPlanner(checkpoint, "cpu", steps=STEPS).policy


@pytest.fixture
def local(policy) -> TrajPlanner:
    """What a client of the shared service should agree with."""
    return TrajPlanner.of_policy(policy, steps=STEPS)


@pytest.fixture
def dataset(located) -> PickPlaceCan:
    config = dataclasses.replace(PickPlaceCan.config, image_hw=(64, 64))
    return PickPlaceCan(config=config, train=False)
