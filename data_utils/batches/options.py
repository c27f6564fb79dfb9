"""How batches are put together, and by how many processes."""

from __future__ import annotations

from dataclasses import dataclass

SAMPLE_BY = ("episode", "frame")  # what an item of a dataset is


@dataclass(frozen=True)
class LoaderOptions:
    """What a loader is asked for; checked when constructed.

    Args:
        batch_size: samples per batch of one rank.
        workers: processes; 0 loads in this one, which then has no protection against files that crash a library.
        seed: of the order and of everything drawn.
        weights: share of each dataset; None: every episode (or frame) ``multiplex`` times per epoch.
        multiplex: rounds per epoch; with weights, an epoch is ``multiplex`` times all items.
        sample_by: "episode": an epoch goes through episodes, of which a frame is drawn; "frame": through all frames.
        timeout: seconds to wait for a batch before a worker counts as hanging; 0: for ever.
        pin_memory, persistent_workers, prefetch_factor: as in torch's DataLoader.
    Raises:
        ValueError: an unknown ``sample_by``.
    """

    batch_size: int
    workers: int = 0
    seed: int = 0
    weights: tuple[float, ...] | None = None
    multiplex: int = 1
    sample_by: str = "episode"
    timeout: float = 60.0
    pin_memory: bool = False
    persistent_workers: bool = False
    prefetch_factor: int = 2

    def __post_init__(self) -> None:
        if self.sample_by not in SAMPLE_BY:
            raise ValueError(f"sample_by is {self.sample_by!r}; wanted one of {', '.join(SAMPLE_BY)}")
