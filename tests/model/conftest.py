"""Fixtures of the model tests."""

from __future__ import annotations

import pytest

from tests.conftest import one_thread


@pytest.fixture(scope="package", autouse=True)
def _one_thread():
    """The work is small: threads would wait for each other."""
    with one_thread():
        yield
