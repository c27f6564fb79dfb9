"""Which features the expert gets from the VLM, per token: the bridge from an ``Observation`` to ``VLMFeatures``."""

from __future__ import annotations

import contextlib

import torch
from torch import nn

from apt.model.config import feature_layers
from apt.model.encoders import hub, qwen3vl
from apt.model.encoders.fingerprint import fingerprint
from apt.model.encoders.prompts import PromptTokenizer
from apt.model.experts.base import Modality, VLMFeatures, VLMReads
from apt.model.language_loss import LanguageLoss, next_token_loss
from data_utils.types import Batch, ImageTextBatch, Observation


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
        reads: what the expert reads; layers behind the last of it are not run.
        vision_only: give the expert vision tokens alone (paper's Stage 1).
        frozen_dtype, trained_dtype: of parameters that do not train and that do.
        random_weights: see :func:`apt.model.encoders.hub.load_model`.
        language_modelling: what trains includes all that :meth:`features_and_language_loss` runs.
    """

    def __init__(
        self,
        name: str,
        mode: str,
        layer_stride: int,
        reads: VLMReads,
        vision_only: bool,
        frozen_dtype: torch.dtype = torch.float32,
        trained_dtype: torch.dtype = torch.float32,
        random_weights: bool = False,
        language_modelling: bool = False,
    ) -> None:
        super().__init__()
        self.mode = mode
        self.vision_only = vision_only
        self._name = name
        qwen = hub.load_model(name, trained_dtype if mode == "full" else frozen_dtype, random_weights)
        self.fingerprint = None if random_weights else fingerprint(qwen)
        layers = feature_layers(qwen.config.text_config.num_hidden_layers, layer_stride)
        self.reads = reads
        self.layers = tuple(layers[feature] for feature in reads.hidden_states)
        self.kv_layers = tuple(layers[feature] for feature in reads.keys_values)
        self.read_names = tuple(
            name for name, _ in qwen.named_parameters() if qwen3vl.is_run(name, self.layers, self.kv_layers)
        )
        qwen3vl.set_mode(qwen, mode, self.layers, self.kv_layers, with_head=language_modelling)
        qwen3vl.set_trained_dtype(qwen, trained_dtype)
        self.encoder = qwen3vl.Qwen3VLEncoder(qwen, *hub.load_image_statistics(name))

    @property
    def qwen(self) -> nn.Module:
        """The ``Qwen3VLForConditionalGeneration``."""
        return self.encoder.model

    @property
    def num_layers(self) -> int:
        """Decoder layers that run whole."""
        return qwen3vl.layers_run(self.layers, self.kv_layers)

    @property
    def stream_widths(self) -> list[int]:
        """Channels of each of the :meth:`streams`."""
        text = self.qwen.config.text_config
        both = 2 * text.num_key_value_heads * text.head_dim
        return [text.hidden_size] * (self.reads.inputs_embeds + len(self.layers)) + [both] * len(self.kv_layers)

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
        return self.features(observation, self.streams(observation, camera_keep), camera_keep)

    def features_and_language_loss(
        self, batch: Batch, camera_keep: torch.Tensor | None = None
    ) -> tuple[VLMFeatures, LanguageLoss, LanguageLoss | None]:
        """What :meth:`forward` gives, and from the same pass how well the VLM predicts the prompts; then, where the
        batch brings image-text pairs, how well it predicts their answers."""
        observation, last = batch.observation, self.qwen.config.text_config.num_hidden_layers - 1
        embeds, by_layer, keys_values = self._encode(observation, camera_keep, (*self.layers, last))
        streams = self._read(embeds, by_layer, keys_values)
        prompts = next_token_loss(self.qwen, by_layer[last], observation.input_ids, batch.targets)
        pairs = None if batch.image_text is None else self._pairs_loss(batch.image_text, last)
        return self.features(observation, streams, camera_keep), prompts, pairs

    def _pairs_loss(self, pairs: ImageTextBatch, last: int) -> LanguageLoss:
        _, by_layer, _ = self.encoder(pairs.images, pairs.input_ids, pairs.position_ids, pairs.attention_mask, (last,))
        return next_token_loss(self.qwen, by_layer[last], pairs.input_ids, pairs.targets)

    def expert_tokens(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """(B, L) bool, which tokens of the prompts the expert gets."""
        return input_ids == self.encoder.image_token_id if self.vision_only else attention_mask

    def padded_length(self, observation: Observation) -> int:
        """T, tokens per sample that the expert gets, padding included."""
        length, tokens = observation.input_ids.shape[1], self._tokens_per_camera(observation)
        return min(length, observation.rgb.shape[2] * tokens) if self.vision_only else length

    def streams(self, observation: Observation, camera_keep: torch.Tensor | None = None) -> list[torch.Tensor]:
        """What the VLM itself computes, from images and prompts alone.

        Returns:
            Of ``reads``: input embeddings, hidden states, then keys and values side by side: (B, T, channels) of
            ``stream_widths``, a sample's tokens last.
        """
        streams = self._read(*self._encode(observation, camera_keep, self.layers))
        if self.vision_only:
            order = self._vision_last(observation)
            streams = [_pick(stream, order) for stream in streams]
        return streams

    def _encode(
        self, observation: Observation, camera_keep: torch.Tensor | None, layers: tuple[int, ...]
    ) -> tuple[torch.Tensor, dict[int, torch.Tensor], dict[int, torch.Tensor]]:
        """What the encoder gives: input embeddings, the streams after ``layers``, keys and values of ``kv_layers``."""
        attended = observation.attention_mask
        if camera_keep is not None:
            is_vision, camera, _ = self._slots(observation)
            attended = _without_hidden(attended, is_vision, camera, observation.camera_mask & camera_keep)
        no_grad = torch.no_grad() if self.mode == "frozen" else contextlib.nullcontext()
        with no_grad:
            return self.encoder(
                observation.rgb[:, -1].flatten(0, 1)[observation.image_index],
                observation.input_ids,
                observation.position_ids,
                attended,
                layers,
                self.kv_layers,
            )

    def _read(
        self,
        embeds: torch.Tensor,
        hidden_states: dict[int, torch.Tensor],
        keys_values: dict[int, torch.Tensor],
    ) -> list[torch.Tensor]:
        """Of what :meth:`_encode` gives, what the expert reads, in the order of ``stream_widths``."""
        read = [embeds] if self.reads.inputs_embeds else []
        return [*read, *(hidden_states[layer] for layer in self.layers), *keys_values.values()]

    def features(
        self, observation: Observation, streams: list[torch.Tensor], camera_keep: torch.Tensor | None = None
    ) -> VLMFeatures:
        """``streams`` with all that follows from poses, intrinsics and masks."""
        rows, columns = self._grid(*observation.rgb.shape[-2:])
        pixels = self.encoder.pixels_per_token
        is_vision, camera, token = self._slots(observation)
        batch = torch.arange(len(camera), device=camera.device)[:, None]
        cameras, attended = observation.camera_mask, observation.attention_mask
        if camera_keep is not None:
            cameras = cameras & camera_keep
            attended = _without_hidden(attended, is_vision, camera, cameras)
        mask = observation.mask[:, -1]  # (B, Ncam, H, W)
        patch_seen = mask.unflatten(-1, (columns, pixels)).unflatten(-3, (rows, pixels)).any(-1).any(-2).flatten(-2)
        valid = attended & (~is_vision | patch_seen[batch, camera, token])
        modality = torch.where(is_vision, Modality.VISION, Modality.PAD if self.vision_only else Modality.LANGUAGE)
        norm_xy = token_coordinates(observation.K, rows, columns, pixels)[batch, camera, token]
        per_token = {
            "modality": torch.where(valid, modality, Modality.PAD),
            "position": position_1d(is_vision),
            "camera": camera,
            "norm_xy": torch.where(is_vision.unsqueeze(-1), norm_xy, 0.0),
        }
        rotary = observation.position_ids.amax(0)  # (B, L), of the three axes the furthest
        if self.vision_only:
            order = self._vision_last(observation)
            per_token = {name: _pick(value, order) for name, value in per_token.items()}
            rotary = torch.where(is_vision, rotary, 0)
        first = int(self.reads.inputs_embeds)
        hidden_states, keys_values = streams[first : first + len(self.layers)], streams[first + len(self.layers) :]
        return VLMFeatures(
            inputs_embeds=streams[0] if self.reads.inputs_embeds else None,
            hidden_states=dict(zip(self.reads.hidden_states, hidden_states, strict=True)),
            keys_values=dict(zip(self.reads.keys_values, map(self._split, keys_values), strict=True)),
            rotary_end=rotary.amax(1) + 1,
            world_from_cam=observation.world_from_cam[:, -1],
            camera_mask=cameras,
            **per_token,
        )

    def _split(self, keys_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values (B, T, key-value heads, d) each."""
        both = keys_values.unflatten(-1, (2, -1, self.qwen.config.text_config.head_dim))
        return both[:, :, 0], both[:, :, 1]

    def _tokens_per_camera(self, observation: Observation) -> int:
        rows, columns = self._grid(*observation.rgb.shape[-2:])
        return rows * columns

    def _slots(self, observation: Observation) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(B, L) each: whether a token is a vision slot, of which camera (-1: of none), and which of its tokens."""
        is_vision = observation.input_ids == self.encoder.image_token_id
        return is_vision, *vision_slots(is_vision, observation.camera_mask, self._tokens_per_camera(observation))

    def _vision_last(self, observation: Observation) -> torch.Tensor:
        """(B, T) index of tokens that puts the vision slots last, in their order; T is ``padded_length``."""
        is_vision = observation.input_ids == self.encoder.image_token_id
        order = torch.argsort(is_vision.long(), dim=1, stable=True)
        return order[:, order.shape[1] - self.padded_length(observation) :]


def _without_hidden(
    attended: torch.Tensor, is_vision: torch.Tensor, camera: torch.Tensor, cameras: torch.Tensor
) -> torch.Tensor:
    """``attended`` (B, L) without the vision slots of cameras that ``cameras`` (B, Ncam) leaves out."""
    batch = torch.arange(len(camera), device=camera.device)[:, None]
    return attended & (~is_vision | cameras[batch, camera])


def _pick(x: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """(B, L) or (B, L, C) at ``order`` (B, T)."""
    return torch.gather(x, 1, order if x.ndim == 2 else order.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
