"""Steps whose loss or gradient was not finite: how many, how many in a row, and whose data caused them."""

from __future__ import annotations

from collections import Counter

import torch

from train_utils.backend import Backend

_SHOWN = 8


class NonFiniteSteps:
    """Counts on the device; which samples they were is read at log steps alone, so that no step waits.

    Args:
        device: of the losses.
    """

    def __init__(self, device: torch.device) -> None:
        self._in_a_row = torch.zeros((), device=device)
        self._total = torch.zeros((), device=device)
        self._batches: list[tuple[torch.Tensor, list[str]]] = []  # of this rank, since the last report
        self._reported = 0

    def add_batch(self, finite: torch.Tensor, sources: list[str]) -> None:
        """A micro-batch of this rank: which samples (B * K,) bool gave a finite loss, and their files (B)."""
        self._batches.append((finite, sources))

    def add_step(self, finite: torch.Tensor) -> None:
        """Whether the step updated the weights; alike on every rank."""
        self._in_a_row = torch.where(finite, 0.0, self._in_a_row + 1)
        self._total = self._total + (~finite).float()

    def report(self, backend: Backend) -> tuple[int, int, str]:
        """Skipped steps in all, the number of the latest in a row, and the files at fault since the last report, as a
        text, empty without any. Called by all ranks."""
        total, in_a_row = torch.stack([self._total, self._in_a_row]).int().tolist()
        batches, self._batches = self._batches, []
        if total == self._reported:
            return total, in_a_row, ""
        self._reported = total
        at_fault = [
            source
            for finite, sources in batches
            for ok, source in zip(finite.view(len(sources), -1).all(1).tolist(), sources, strict=True)
            if not ok
        ]
        counts = Counter(backend.gather(at_fault))
        if not counts:
            return total, in_a_row, "every loss was finite, the gradient was not"
        shown = [f"{source} ({times} times)" for source, times in counts.most_common(_SHOWN)]
        more = f" and {len(counts) - _SHOWN} more" if len(counts) > _SHOWN else ""
        return total, in_a_row, f"samples of {', '.join(shown)}{more}"
