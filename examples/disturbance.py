"""Pushes for recorded demonstrations: what is executed leaves the path, what is desired does not."""

from __future__ import annotations

import numpy as np


class Disturbance:
    """Pushes that the executed target suffers and the desired one does not, as in DART.

    Each control step starts a push with ``probability``: 3 to 6 steps of up to ``size`` metres in a random
    horizontal direction and upwards. Recorded episodes so come to hold recoveries from states off the path.
    """

    def __init__(self, rng: np.random.Generator, probability: float, size: float = 0.04) -> None:
        self._rng, self._probability, self._size = rng, probability, size
        self._remaining = 0
        self._offset = np.zeros(3)

    def __call__(self, world_from_ee_target: np.ndarray) -> np.ndarray:
        """The target (4, 4) to execute in place of the desired one."""
        if self._remaining == 0 and self._rng.random() < self._probability:
            self._remaining = int(self._rng.integers(3, 7))
            angle, size = self._rng.uniform(-np.pi, np.pi), self._rng.uniform(0.5, 1.0) * self._size
            self._offset = size * np.array([np.cos(angle), np.sin(angle), 0.5 * self._rng.random()])
        if self._remaining == 0:
            return world_from_ee_target
        self._remaining -= 1
        pushed = world_from_ee_target.copy()
        pushed[:3, 3] += self._offset
        return pushed
