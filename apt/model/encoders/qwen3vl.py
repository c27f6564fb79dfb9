"""What of a Qwen3-VL trains, and its residual stream after chosen layers."""

from __future__ import annotations

import re

import torch
from torch import nn

from apt.model.encoders.hub import VLM_MODES
from apt.model.encoders.vision_tower import VisionTower
from apt.model.layers.positions import rotate

LORA_RANK = 16
LORA_ALPHA = 16
_LORA_TARGETS = r".*language_model\.layers\.\d+\.(self_attn\.(q|k|v|o)_proj|mlp\.(gate|up|down)_proj)"
_KEYS_VALUES = re.compile(r"input_layernorm\.|self_attn\.(k_proj|k_norm|v_proj)\.")  # a decoder layer's
# Kept in float32 whatever the parameters' dtype: small updates to them are lost in bfloat16's rounding.
_FLOAT32_PARAMETERS = re.compile(r"norm|patch_embed|pos_embed|embed_tokens")


def set_mode(
    model: nn.Module, mode: str, layers: tuple[int, ...], kv_layers: tuple[int, ...], with_head: bool = False
) -> None:
    """Choose what trains: nothing, LoRA adapters, or everything that can reach what is read.

    Parameters behind that get no gradient and stay frozen.

    Args:
        layers: decoder layers whose residual stream is read.
        kv_layers: decoder layers whose keys and values are read.
        with_head: whether all layers, the final norm and the language head are run.
    """
    if mode not in VLM_MODES:
        raise ValueError(f"unknown VLM mode {mode!r}; choose from {', '.join(VLM_MODES)}")
    model.requires_grad_(False)
    if mode == "lora":
        from peft import LoraConfig, inject_adapter_in_model

        config = LoraConfig(r=LORA_RANK, lora_alpha=LORA_ALPHA, lora_dropout=0.0, target_modules=_LORA_TARGETS)
        inject_adapter_in_model(config, model)
    for name, parameter in model.named_parameters():
        wanted = "lora_" in name if mode == "lora" else mode == "full"
        parameter.requires_grad_(wanted and (with_head or is_run(name, layers, kv_layers)))


def layers_run(layers: tuple[int, ...], kv_layers: tuple[int, ...]) -> int:
    """How many decoder layers run whole; of one behind them, keys and values may be computed alone."""
    return max([layer + 1 for layer in layers] + list(kv_layers), default=0)


def is_run(name: str, layers: tuple[int, ...], kv_layers: tuple[int, ...]) -> bool:
    """Whether what is read depends on this parameter."""
    if name.startswith(("lm_head.", "model.language_model.norm.")):
        return False
    level = re.search(r"deepstack_merger_list\.(\d+)\.", name)
    if level:
        return int(level.group(1)) < layers_run(layers, kv_layers)
    layer = re.search(r"language_model\.layers\.(\d+)\.(.*)", name)
    if layer is None or int(layer.group(1)) < layers_run(layers, kv_layers):
        return True
    return int(layer.group(1)) in kv_layers and bool(_KEYS_VALUES.match(layer.group(2)))


def set_trained_dtype(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast what trains to ``dtype``, keeping norms, patch, position and token embeddings in float32."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.float32 if _FLOAT32_PARAMETERS.search(name) else dtype)


class Qwen3VLEncoder(nn.Module):
    """The part of Qwen3-VL a policy reads: image and token embeddings, the residual stream after chosen layers.

    Args:
        model: ``Qwen3VLForConditionalGeneration``.
        image_mean, image_std: of its image processor.
    """

    def __init__(self, model: nn.Module, image_mean: list[float], image_std: list[float]) -> None:
        super().__init__()
        self.model = model
        self.image_token_id: int = model.config.image_token_id
        self.image_statistics = (list(image_mean), list(image_std))
        self._vision = VisionTower(model.model.visual, image_mean, image_std)

    @property
    def pixels_per_token(self) -> int:
        """Side of the square of pixels that one VLM token stands for."""
        vision = self.model.config.vision_config
        return vision.patch_size * vision.spatial_merge_size

    def see(self, images: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """What the decoder is given of ``images`` (Nimg, 3, H, W) uint8: (Nimg, tokens, C), and as much per DeepStack
        level."""
        return self._vision(images)

    def forward(
        self,
        images: torch.Tensor,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        layers: tuple[int, ...],
        kv_layers: tuple[int, ...] = (),
    ) -> tuple[torch.Tensor, dict[int, torch.Tensor], dict[int, torch.Tensor]]:
        """Multimodal input embeddings, the residual stream after ``layers``, keys and values of ``kv_layers``.

        Args:
            images: (Nimg, 3, H, W) uint8, in the order of their placeholders in ``input_ids``.
            input_ids: (B, L); position_ids: (3, B, L); attention_mask: (B, L) bool.
            layers, kv_layers: decoder layers, ascending; later ones are not run.
        Returns:
            (B, L, C); one (B, L, C) per layer: after DeepStack's addition, what the next layer reads; and one
            (B, L, 2 * key-value heads * d) per layer: its own keys, rotary positions in, and behind them its values.
        """
        text = self.model.model.language_model
        embeds = text.embed_tokens(input_ids)
        slots = (input_ids == self.image_token_id).unsqueeze(-1)
        levels: list[torch.Tensor] = []
        if len(images):
            image_embeds, deepstack = self.see(images)
            embeds = embeds.masked_scatter(slots, image_embeds.to(embeds.dtype))
            zeros = torch.zeros_like(embeds)
            levels = [zeros.masked_scatter(slots, level.to(zeros.dtype)) for level in deepstack]

        causal = torch.ones(input_ids.shape[1], input_ids.shape[1], dtype=torch.bool, device=input_ids.device).tril()
        # Padding sees itself, so that no row of the softmax is empty.
        mask = causal & attention_mask[:, None, None, :] | torch.eye(
            len(causal), dtype=torch.bool, device=causal.device
        )
        rotary = text.rotary_emb(embeds, position_ids)
        x, streams, keys_values = embeds, {}, {}
        num_layers = layers_run(layers, kv_layers)
        for index in range(max([num_layers, *(layer + 1 for layer in kv_layers)])):
            if index in kv_layers:
                keys_values[index] = _keys_values(text.layers[index], x, *rotary)
            if index == num_layers:
                break
            x = text.layers[index](x, attention_mask=mask, position_embeddings=rotary)
            if index < len(levels):
                x = x + levels[index]
            if index in layers:
                streams[index] = x
        return embeds, streams, keys_values


def _keys_values(layer: nn.Module, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """A decoder layer's keys, as its attention compares them, and values, of its input (B, L, C).

    Computed beside the layer's own: a hook would not see them under gradient checkpointing.
    """
    attention, normed = layer.self_attn, layer.input_layernorm(x)
    keys = attention.k_norm(attention.k_proj(normed).unflatten(-1, (-1, attention.head_dim)))
    return torch.cat([rotate(keys, cos.unsqueeze(2), sin.unsqueeze(2)).flatten(-2), attention.v_proj(normed)], dim=-1)
