"""The typed structures that cross the boundary between data and policy.

Shapes: ``B`` batch, ``To`` observed frames, ``Ncam`` cameras, ``Nee`` arms, ``Th`` history steps, ``Ta`` future
steps, ``L`` prompt tokens. Poses are 4x4 and named by their frames: ``world_from_cam`` maps camera coordinates
(OpenCV axes) to the world. An end-effector state is 17 numbers: a row-major ``world_from_ee`` and the gripper's
openness in [0 closed, 1 open]. Lengths are metres, times seconds.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from data_utils.errors import UnusableEpisode

if TYPE_CHECKING:
    import torch


@dataclass
class Sample:
    """One observation and, in training, what followed it (numpy)."""

    rgb: np.ndarray  # (To, Ncam, 3, H, W) uint8, letterboxed
    mask: np.ndarray  # (To, Ncam, H, W) bool, True where the pixel shows the scene
    K: np.ndarray  # (Ncam, 3, 3) float32, at (H, W)
    world_from_cam: np.ndarray  # (To, Ncam, 4, 4) float32
    prompt: str
    world_from_ee: np.ndarray  # (Nee, 4, 4) float32, now
    world_from_ref: np.ndarray  # (Nee, 4, 4) float32, the camera whose axes this arm's action is expressed in
    history: np.ndarray  # (Th, Nee, 17) float32, ends now
    valid_ee: np.ndarray  # (Nee,) bool, False for padded arms
    gripper_mask: np.ndarray  # (Nee,) bool, False where the arm has no gripper to predict
    timestamp: float
    future: np.ndarray | None = None  # (Ta, Nee, 17) float32, None when serving
    color: ColorDraws | None = None  # changes of colour still to be made, on the device
    source: str = ""  # file and frame, for messages
    skipped: tuple[UnusableEpisode, ...] = ()  # tried before this one


@dataclass
class TokenizedPrompt:
    """A prompt as the VLM reads it, images' placeholder tokens included (numpy)."""

    ids: np.ndarray  # (L,) int64
    position_ids: np.ndarray  # (3, L) int64: temporal, row and column position (multimodal RoPE)
    num_targets: int = 0  # how many of the last tokens a language-modelling loss asks for


@dataclass
class TextTargets:
    """Tokens that a language-modelling loss asks for: so many of the last ones of each left-padded row."""

    counts: torch.Tensor  # (B,) int64
    longest: int  # the largest count, known on the host: nothing waits for the device to learn it


@dataclass
class ImageTextBatch:
    """Images with a prompt and its answer each, that a VLM trains on beside the robot's data (torch)."""

    images: torch.Tensor  # (N, 3, H, W) uint8, letterboxed
    input_ids: torch.Tensor  # (N, L) int64, left-padded
    position_ids: torch.Tensor  # (3, N, L) int64
    attention_mask: torch.Tensor  # (N, L) bool, False on padding
    targets: TextTargets  # the answers, each with the token that ends the turn

    def to(self, device: torch.device | str, non_blocking: bool = True) -> "ImageTextBatch":
        return _to(self, device, non_blocking)

    def pin_memory(self) -> "ImageTextBatch":
        return map_tensors(self, lambda tensor: tensor.pin_memory())


@dataclass
class Observation:
    """What the policy sees, batched (torch)."""

    rgb: torch.Tensor  # (B, To, Ncam, 3, H, W) uint8
    mask: torch.Tensor  # (B, To, Ncam, H, W) bool
    K: torch.Tensor  # (B, Ncam, 3, 3)
    world_from_cam: torch.Tensor  # (B, To, Ncam, 4, 4)
    world_from_ee: torch.Tensor  # (B, Nee, 4, 4)
    world_from_ref: torch.Tensor  # (B, Nee, 4, 4)
    history: torch.Tensor  # (B, Th, Nee, 17)
    valid_ee: torch.Tensor  # (B, Nee) bool
    camera_mask: torch.Tensor  # (B, Ncam) bool: shown to the VLM (its newest mask is not empty)
    image_index: torch.Tensor  # (Nimg,) int64: shown images as indices into the flattened (B * Ncam)
    input_ids: torch.Tensor  # (B, L) int64, left-padded
    position_ids: torch.Tensor  # (3, B, L) int64
    attention_mask: torch.Tensor  # (B, L) bool, False on padding
    prompt: list[str]  # B

    def to(self, device: torch.device | str, non_blocking: bool = True) -> "Observation":
        return _to(self, device, non_blocking)

    def pin_memory(self) -> "Observation":
        return map_tensors(self, lambda tensor: tensor.pin_memory())

    @property
    def batch_size(self) -> int:
        return self.rgb.shape[0]


@dataclass
class StoredStreams:
    """What is on disk of a frozen VLM's answers to a batch (``train_utils/feature_store.py``)."""

    streams: torch.Tensor  # (B, T, channels): all of the VLM's streams side by side, undefined where missing
    missing: torch.Tensor  # (M,) int64, samples that are not on disk
    missing_images: torch.Tensor  # (I,) int64, their shown images as indices into the flattened (M * Ncam)
    missing_keys: list[bytes]  # M
    missing_lengths: list[int]  # M, tokens of each that count, the last ones of T


@dataclass
class Batch:
    """Observations and their targets, batched (torch)."""

    observation: Observation
    future: torch.Tensor  # (B, Ta, Nee, 17)
    gripper_mask: torch.Tensor  # (B, Nee) bool
    timestamp: torch.Tensor  # (B,) float64
    source: list[str]  # B
    targets: TextTargets  # the text behind each sample's last image, template included
    skipped: list[UnusableEpisode] = dataclasses.field(default_factory=list)  # of all samples
    color: ColorDraws | None = None  # changes of colour still to be made (B, Ncam, ...)
    stored: StoredStreams | None = None  # where it was looked up in a cache
    image_text: ImageTextBatch | None = None  # what the VLM trains on beside these

    def to(self, device: torch.device | str, non_blocking: bool = True) -> "Batch":
        return _to(self, device, non_blocking)

    def pin_memory(self) -> "Batch":
        return map_tensors(self, lambda tensor: tensor.pin_memory())


def map_tensors(value, function: Callable[[torch.Tensor], object]):
    """``value`` with ``function`` of every tensor in it, through dicts, lists, tuples and dataclasses.

    What stands in several places is mapped once and shared again.
    """
    import torch  # seconds, which whoever only names these types need not wait

    done: dict[int, object] = {}

    def mapped(item):
        if id(item) not in done:
            done[id(item)] = with_tensors_mapped(item)
        return done[id(item)]

    def with_tensors_mapped(item):
        if isinstance(item, torch.Tensor):
            return function(item)
        if type(item) in (list, tuple):
            return type(item)(mapped(part) for part in item)
        if isinstance(item, dict):
            return {key: mapped(part) for key, part in item.items()}
        if dataclasses.is_dataclass(item):
            return type(item)(**{f.name: mapped(getattr(item, f.name)) for f in dataclasses.fields(item)})
        return item

    return mapped(value)


def _to(value, device, non_blocking):
    return map_tensors(value, lambda tensor: tensor.to(device, non_blocking=non_blocking))


@dataclass
class ColorDraws:
    """What happens to the colours of ``Ncam`` images; numpy in a sample, torch with a leading B in a batch."""

    window: np.ndarray | torch.Tensor  # (Ncam, 4) int64: top, left, height, width of the part that shows the scene
    lookup: np.ndarray | torch.Tensor  # (Ncam, 3, 256) uint8, per RGB channel
    mix: np.ndarray | torch.Tensor  # (Ncam, 3, 3) float32 on RGB columns
    blur: np.ndarray | torch.Tensor  # (Ncam, MAX_BLUR_TAPS) float32, the middle alone where nothing is blurred
    patches: np.ndarray | torch.Tensor  # (Ncam, MAX_PATCHES, 4) int64: top, left, height, width; empty ones are zero
    patch_colors: np.ndarray | torch.Tensor  # (Ncam, MAX_PATCHES, 3) uint8
