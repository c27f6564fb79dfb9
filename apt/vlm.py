"""Which features the expert gets from the VLM, per token: the bridge from an ``Observation`` to ``VLMFeatures``."""

from __future__ import annotations

import contextlib

import torch
from torch import nn

from apt.encoders import hub, qwen3vl
from apt.encoders.prompts import PromptTokenizer
from apt.experts.base import Modality, VLMFeatures
from apt.policy_config import feature_layers
from data_utils.types import Observation


def vision_slots(
    is_vision: torch.Tensor, camera_mask: torch.Tensor, tokens_per_camera: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Which camera and which of its tokens each vision slot is.

    Slots belong to the shown cameras in order, ``tokens_per_camera`` each.

    Args:
        is_vision: (B, L) bool; camera_mask: (B, Ncam) bool, cameras that are shown.
    Returns:
        camera (B, L), -1 where not a vision slot, and token (B, L).
    """
    rank = (is_vision.long().cumsum(1) - 1).clamp(min=0)
    shown_first = torch.argsort(~camera_mask, dim=1, stable=True)
    shown = (rank // tokens_per_camera).clamp(max=camera_mask.shape[1] - 1)
    camera = torch.gather(shown_first, 1, shown)
    return torch.where(is_vision, camera, -1), rank % tokens_per_camera


def token_coordinates(K: torch.Tensor, rows: int, columns: int, pixels: int) -> torch.Tensor:
    """Camera-plane coordinates of an image's tokens: the mean of ``((u-cx)/fx, (v-cy)/fy)`` over each token's pixels.

    Args:
        K: (..., 3, 3) at the image's size of ``rows * pixels`` by ``columns * pixels``.
    Returns:
        (..., rows * columns, 2), row-major. Affine in the pixel, hence exact from a token's middle.
    """
    u = pixels * torch.arange(columns, device=K.device, dtype=K.dtype) + (pixels - 1) / 2
    v = pixels * torch.arange(rows, device=K.device, dtype=K.dtype) + (pixels - 1) / 2
    x = (u - K[..., 0, 2, None]) / K[..., 0, 0, None]  # (..., columns)
    y = (v - K[..., 1, 2, None]) / K[..., 1, 1, None]  # (..., rows)
    grid = torch.broadcast_tensors(x.unsqueeze(-2), y.unsqueeze(-1))
    return torch.stack(grid, dim=-1).flatten(-3, -2)


def position_1d(is_vision: torch.Tensor) -> torch.Tensor:
    """1-D positions (B, L): only the sample's first vision token uses one up, later ones share it."""
    index = torch.arange(is_vision.shape[1], device=is_vision.device)
    return index - (is_vision.long().cumsum(1) - 1).clamp(min=0)


class VLM(nn.Module):
    """Qwen3-VL seen by an action expert.

    Args:
        name: Hugging Face name, local folder, or ``tiny``.
        mode: ``frozen``, ``lora`` or ``full``.
        layer_stride: features are the streams after decoder layers 0, s, 2s, ...
        required_features: indices of the features that the expert reads; layers behind the last are not run.
        vision_only: give the expert vision tokens alone (paper's Stage 1).
        frozen_dtype, trained_dtype: of parameters that do not train and that do.
        random_weights: see :func:`apt.encoders.hub.load_model`.
    """

    def __init__(
        self,
        name: str,
        mode: str,
        layer_stride: int,
        required_features: tuple[int, ...],
        vision_only: bool,
        frozen_dtype: torch.dtype = torch.float32,
        trained_dtype: torch.dtype = torch.float32,
        random_weights: bool = False,
    ) -> None:
        super().__init__()
        self.mode = mode
        self.vision_only = vision_only
        self._name = name
        qwen = hub.load_model(name, trained_dtype if mode == "full" else frozen_dtype, random_weights)
        layers = feature_layers(qwen.config.text_config.num_hidden_layers, layer_stride)
        self._feature_of_layer = {layers[feature]: feature for feature in required_features}
        qwen3vl.set_mode(qwen, mode, num_layers=max(self._feature_of_layer, default=-1) + 1)
        qwen3vl.set_trained_dtype(qwen, trained_dtype)
        self.encoder = qwen3vl.Qwen3VLEncoder(qwen, *hub.load_image_statistics(name))

    @property
    def qwen(self) -> nn.Module:
        """The ``Qwen3VLForConditionalGeneration``."""
        return self.encoder.model

    def prompt_tokenizer(self, image_hw: tuple[int, int]) -> PromptTokenizer:
        """The tokenizer of this policy's observations; raises ``ValueError`` where the image size does not fit."""
        tokenizer = hub.load_tokenizer(self._name)
        image_token = tokenizer.convert_ids_to_tokens(self.encoder.image_token_id)
        return PromptTokenizer(tokenizer, image_token, self._grid(*image_hw), self.vision_only)

    def _grid(self, height: int, width: int) -> tuple[int, int]:
        pixels = self.encoder.pixels_per_token
        if height % pixels or width % pixels:
            raise ValueError(f"images are {height}x{width}; height and width must be multiples of {pixels} pixels")
        return height // pixels, width // pixels

    def train(self, mode: bool = True) -> "VLM":
        return super().train(mode and self.mode != "frozen")

    def forward(self, observation: Observation, camera_keep: torch.Tensor | None = None) -> VLMFeatures:
        """Features of the newest frame; ``camera_keep`` (B, Ncam) bool hides shown cameras (view dropout)."""
        rgb, mask = observation.rgb[:, -1], observation.mask[:, -1]  # (B, Ncam, 3, H, W), (B, Ncam, H, W)
        rows, columns = self._grid(*rgb.shape[-2:])
        pixels = self.encoder.pixels_per_token
        is_vision = observation.input_ids == self.encoder.image_token_id
        camera, token = vision_slots(is_vision, observation.camera_mask, rows * columns)
        batch = torch.arange(len(camera), device=camera.device)[:, None]
        cameras = observation.camera_mask
        attended = observation.attention_mask
        if camera_keep is not None:
            cameras = cameras & camera_keep
            attended = attended & (~is_vision | cameras[batch, camera])

        no_grad = torch.no_grad() if self.mode == "frozen" else contextlib.nullcontext()
        with no_grad:
            embeds, streams = self.encoder(
                rgb.flatten(0, 1)[observation.image_index],
                observation.input_ids,
                observation.position_ids,
                attended,
                tuple(self._feature_of_layer),
            )

        patch_seen = mask.unflatten(-1, (columns, pixels)).unflatten(-3, (rows, pixels)).any(-1).any(-2).flatten(-2)
        valid = attended & (~is_vision | patch_seen[batch, camera, token])
        modality = torch.where(is_vision, Modality.VISION, Modality.LANGUAGE)
        norm_xy = token_coordinates(observation.K, rows, columns, pixels)[batch, camera, token]
        features = VLMFeatures(
            inputs_embeds=embeds,
            hidden_states={self._feature_of_layer[layer]: stream for layer, stream in streams.items()},
            modality=torch.where(valid, modality, Modality.PAD),
            position=position_1d(is_vision),
            camera=camera,
            norm_xy=torch.where(is_vision.unsqueeze(-1), norm_xy, 0.0),
            world_from_cam=observation.world_from_cam[:, -1],
            camera_mask=cameras,
        )
        return vision_tokens(features, rgb.shape[1] * rows * columns) if self.vision_only else features


def vision_tokens(features: VLMFeatures, most: int) -> VLMFeatures:
    """Features of the vision slots alone, left-padded to ``most`` tokens or fewer."""
    length = features.camera.shape[1]
    is_vision = features.camera >= 0
    order = torch.argsort(is_vision.long(), dim=1, stable=True)[:, max(0, length - most) :]  # vision slots last

    def pick(x: torch.Tensor) -> torch.Tensor:
        index = order if x.ndim == 2 else order.unsqueeze(-1).expand(-1, -1, x.shape[-1])
        return torch.gather(x, 1, index)

    modality = pick(features.modality)
    return VLMFeatures(
        inputs_embeds=pick(features.inputs_embeds),
        hidden_states={index: pick(stream) for index, stream in features.hidden_states.items()},
        modality=torch.where(modality == Modality.LANGUAGE, Modality.PAD, modality),
        position=pick(features.position),
        camera=pick(features.camera),
        norm_xy=pick(features.norm_xy),
        world_from_cam=features.world_from_cam,
        camera_mask=features.camera_mask,
    )
