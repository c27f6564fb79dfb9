"""What a policy is made of: sizes and choices, checked, without the libraries that build it.

Command lines read these long before (and often without) a model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from apt.model.action_scale import full_scale, scale_words
from apt.model.encoders.hub import VLM_MODES, load_config
from apt.model.experts.config import ExpertConfig, VLMAttention
from apt.model.experts.registry import check_architecture
from apt.model.objectives.registry import prediction_of

SIZES = {"tiny": (192, 3), "small": (384, 6), "base": (768, 12)}  # name -> (width h, heads)


def feature_layers(num_decoder_layers: int, stride: int) -> tuple[int, ...]:
    """Decoder layers whose residual stream is a feature: ``0, s, 2s, ...``."""
    if stride < 1:
        raise ValueError(f"vlm_layer_stride is {stride}; it must be at least 1")
    return tuple(range(0, num_decoder_layers, stride))


@dataclass(frozen=True)
class VLAConfig:
    """What a policy is made of. Checked when constructed; nothing is loaded."""

    model: str = "base"
    """Size of the expert: tiny, small or base."""
    arch: str = "apt"
    """Architecture of the expert (apt/model/experts/registry.py)."""
    objective: str = "ddim"
    """ddim (diffusion) or flow (flow matching)."""
    prediction: str | None = None
    """What the network's answer means (apt/model/objectives/registry.py); None: as usual for the objective, epsilon of
    ddim and velocity of flow."""
    action_scale: tuple[float, ...] | None = None
    """3 numbers (translation in metres, rotation, gripper) or 10 by which actions are divided before noise is added to
    them; None: 1."""
    vlm: str = "Qwen/Qwen3-VL-2B-Instruct"
    """Hugging Face name, local folder, or "tiny"."""
    vlm_layer_stride: int = 3
    vlm_mode: str = "frozen"
    train_stage: int = 1
    """0: VA prior (paper's Stage 1). 1: VLA (paper's Stage 2)."""
    num_history: int = 1
    num_future: int = 32
    action_step_embedding: bool = False
    attention_backend: str = "sdpa"
    gradient_checkpointing: bool = False
    knowledge_insulation: bool = False
    """Nothing that the expert learns changes the VLM."""
    lm_loss_weight: float = 0.0
    """Of the VLM's own loss, the prediction of the prompts' tokens; 0: none."""

    def __post_init__(self) -> None:
        if self.model not in SIZES:
            raise ValueError(f"unknown model size {self.model!r}; choose from {', '.join(SIZES)}")
        check_architecture(self.arch)
        prediction_of(self.objective, self.prediction)
        full_scale(self.action_scale)
        if self.vlm_mode not in VLM_MODES:
            raise ValueError(f"unknown VLM mode {self.vlm_mode!r}; choose from {', '.join(VLM_MODES)}")
        if self.train_stage == 0 and self.vlm_mode != "frozen":
            raise ValueError(
                f"stage 0 trains the VA prior with a frozen VLM; vlm mode {self.vlm_mode!r} is for stage 1"
            )
        if not 0 <= self.lm_loss_weight < float("inf"):
            raise ValueError(f"lm_loss_weight is {self.lm_loss_weight}; wanted 0 (none) or more")
        if self.lm_loss_weight > 0 and self.vlm_mode == "frozen":
            raise ValueError(
                f"lm_loss_weight {self.lm_loss_weight:g} needs a VLM that trains: train_stage 1 with vlm_finetune_mode "
                "lora or full"
            )
        if self.knowledge_insulation and self.vlm_mode != "frozen" and self.lm_loss_weight == 0:
            raise ValueError(
                f"knowledge_insulation leaves a VLM in mode {self.vlm_mode!r} nothing to train on; give "
                "lm_loss_weight, or vlm_finetune_mode frozen"
            )

    def expert_config(self) -> ExpertConfig:
        """Sizes of the expert; reads the VLM's configuration (not its weights)."""
        text = load_config(self.vlm).text_config
        width, heads = SIZES[self.model]
        return ExpertConfig(
            width=width,
            heads=heads,
            num_layers=len(feature_layers(text.num_hidden_layers, self.vlm_layer_stride)),
            input_dim=text.hidden_size,
            train_stage=self.train_stage,
            num_history=self.num_history,
            num_future=self.num_future,
            action_step_embedding=self.action_step_embedding,
            attention_backend=self.attention_backend,
            objective=self.objective,
            prediction=self.prediction,
            action_scale=self.action_scale,
            vlm_attention=VLMAttention(
                text.num_attention_heads,
                text.num_key_value_heads,
                text.head_dim,
                text.rope_parameters["rope_theta"],
            ),
        )


def meaning(fields: Mapping[str, Any]) -> dict[str, str]:
    """What a policy's weights mean and no tensor's shape tells: by field, as its flag is given.

    Args:
        fields: of a run's configuration; those that are missing are as in released models.
    Raises:
        ValueError: they contradict each other.
    """
    objective = fields.get("objective", VLAConfig.objective)
    return {
        "objective": objective,
        "prediction": prediction_of(objective, fields.get("prediction")),
        "action_scale": scale_words(fields.get("action_scale")),
        "action_step_embedding": str(fields.get("action_step_embedding", VLAConfig.action_step_embedding)),
    }
