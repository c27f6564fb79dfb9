"""The statistics that LeRobot keeps of every feature, per episode and of all."""

from __future__ import annotations

import numpy as np

QUANTILES = {"q01": 0.01, "q10": 0.10, "q50": 0.50, "q90": 0.90, "q99": 0.99}
SAMPLED_FRAMES = 100


def of_values(values: np.ndarray) -> dict[str, list]:
    """Of (T, n) or (T,) numbers: a list of n each, and the number of frames."""
    values = np.asarray(values, np.float64).reshape(len(values), -1)
    out = {"min": values.min(0), "max": values.max(0), "mean": values.mean(0), "std": values.std(0)}
    out |= {name: np.quantile(values, q, axis=0) for name, q in QUANTILES.items()}
    return {name: value.tolist() for name, value in out.items()} | {"count": [len(values)]}


class ImageStatistics:
    """Per channel in [0, 1], from at most 100 frames spread over a video and one pixel in every 4 x 4."""

    def __init__(self, length: int) -> None:
        self._chosen = set(np.linspace(0, length - 1, min(length, SAMPLED_FRAMES)).round().astype(int).tolist())
        self._pixels: list[np.ndarray] = []

    def add(self, index: int, image: np.ndarray) -> None:
        """(H, W, 3) uint8."""
        if index in self._chosen:
            self._pixels.append(image[::4, ::4].reshape(-1, 3))

    def result(self) -> dict[str, list]:
        """As LeRobot shapes them: (3, 1, 1) each; the count is of frames."""
        found = of_values(np.concatenate(self._pixels) / 255.0)
        shaped = {name: [[[number]] for number in numbers] for name, numbers in found.items() if name != "count"}
        return shaped | {"count": [len(self._pixels)]}


def combined(of_episodes: list[dict[str, list]]) -> dict[str, list]:
    """Of all episodes together; quantiles are means of the episodes' own, weighted by their lengths, as LeRobot's."""
    counts = np.array([item["count"][0] for item in of_episodes], np.float64)
    stacked = {name: np.array([item[name] for item in of_episodes]) for name in of_episodes[0] if name != "count"}
    weights = (counts / counts.sum()).reshape(-1, *[1] * (stacked["mean"].ndim - 1))
    mean = (weights * stacked["mean"]).sum(0)
    variance = (weights * (stacked["std"] ** 2 + (stacked["mean"] - mean) ** 2)).sum(0)
    out = {"min": stacked["min"].min(0), "max": stacked["max"].max(0), "mean": mean, "std": np.sqrt(variance)}
    out |= {name: (weights * stacked[name]).sum(0) for name in QUANTILES}
    return {name: value.tolist() for name, value in out.items()} | {"count": [int(counts.sum())]}
