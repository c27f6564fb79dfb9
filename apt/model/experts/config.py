"""Sizes of an action expert, checked when constructed; known without any library that builds one."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

from apt.model.action_scale import full_scale
from apt.model.objectives.registry import prediction_of

ATTENTION_BACKENDS = ("sdpa", "xformers")


def check_attention_backend(backend: str) -> None:
    """Raise ``ValueError`` for an unknown back-end and ``ImportError`` for one that is not installed."""
    if backend not in ATTENTION_BACKENDS:
        raise ValueError(f"unknown attention back-end {backend!r}; choose from {', '.join(ATTENTION_BACKENDS)}")
    if backend == "xformers" and importlib.util.find_spec("xformers") is None:
        raise ImportError('attention back-end "xformers" is not installed; pip install xformers, or use "sdpa"')


@dataclass(frozen=True)
class VLMAttention:
    """Shape of a VLM's own attention, for an expert that joins it."""

    heads: int
    kv_heads: int
    head_dim: int
    rope_theta: float


@dataclass(frozen=True)
class ExpertConfig:
    """Sizes of an expert. ``train_stage`` is 0 for the VA prior (paper's Stage 1) and 1 for the VLA (Stage 2)."""

    width: int
    heads: int
    num_layers: int  # N, depth of Stage 2 and number of VLM features
    input_dim: int  # C, width of the VLM
    train_stage: int = 1
    num_history: int = 1
    num_future: int = 32
    train_timesteps: int = 100
    inference_timesteps: int | None = None  # None: as usual for the objective and the architecture
    action_step_embedding: bool = False
    attention_backend: str = "sdpa"
    objective: str = "ddim"
    prediction: str | None = None  # what the network's answer means; None: as usual for the objective
    action_scale: tuple[float, ...] | None = None  # 3 or 10 numbers that actions are divided by; None: 1
    vlm_attention: VLMAttention | None = None

    def __post_init__(self) -> None:
        if self.train_stage not in (0, 1):
            raise ValueError(f"train_stage is {self.train_stage}; wanted 0 (VA prior) or 1 (VLA)")
        if self.num_layers < 2 or self.num_layers % 2:
            raise ValueError(
                f"the expert's depth is {self.num_layers}; it must be even and at least 2, since Stage 2 pairs a "
                "language layer with each VA layer. Choose another VLM layer stride."
            )
        if self.width % self.heads or (self.width // self.heads) % 8:
            raise ValueError(
                f"width {self.width} over {self.heads} heads: a head's width must be a whole multiple of 8, half "
                "of it for poses in blocks of 4"
            )
        check_attention_backend(self.attention_backend)
        prediction_of(self.objective, self.prediction)
        full_scale(self.action_scale)
