"""How a small vision-language model is built and trained."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class SmallVLM:
    """Sizes. A token stands for 16 x 16 pixels."""

    width: int = 128
    layers: int = 6
    heads: int = 4
    kv_heads: int = 2
    vision_width: int = 64
    vision_layers: int = 3
    bins: int = 48
    """Places along each side of an image that have a word of their own."""


@dataclass(frozen=True)
class GroundingConfig:
    scenes: Path
    """Folder of rendered parts; the first part is for judging alone."""
    out: Path
    """Folder for the model, its card and what resuming needs."""
    init: Path | None = None
    """Model of an earlier run to go on from, with its sizes and tokenizer; None: fresh weights."""
    steps: int = 2000
    vision_steps: int = 3000
    """Steps before these in which the vision tower trains alone, on what lies in each cell: a third of the
    time each."""
    batch: int = 32
    """Sequences of four questions each."""
    lr: float = 1.5e-3
    wd: float = 0.02
    warmup: float = 0.03
    """Share of the steps in which the rate rises; from there it falls as a cosine."""
    all_cameras: float = 0.9
    """Share of the sequences about all pictures, as a policy shows them; the others are about one."""
    looking_layer: int = 1
    """Decoder layer that is told to look from a name to what is named; places are known from there on."""
    seed: int = 0
    threads: int | None = None
    """CPU threads; None: torch's own number."""
    judge_every: int = 200
    """Steps between two judgements on held-out scenes, which are saved with the state."""
    sizes: SmallVLM = dataclasses.field(default_factory=SmallVLM)

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "judge_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be at least 1")
        if self.vision_steps < 0:
            raise ValueError(f"--vision-steps is {self.vision_steps}; it cannot be negative")
        for name in ("warmup", "all_cameras"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it is a share, from 0 to 1")

    def settings(self) -> dict:
        """What the weights depend on."""
        values = dataclasses.asdict(self) | {"init": None if self.init is None else self.init.name}
        return {name: value for name, value in values.items() if name not in ("scenes", "out", "threads")}
