"""Training-time image augmentation on uint8 frames, from an explicit generator.

One draw per camera and sample: all observed frames of a camera are changed alike. The crop moves the image's geometry,
so its window is given to the caller, who makes the intrinsics follow. Colours are changed here, frame by frame, on a
CPU; where there is a GPU the same draws are applied to whole batches there (``device_augment.py``).
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from data_utils.config import DataConfig

CROP_RANGE = (0.95, 1.0)
COLOR_RANGE = (0.75, 1.25)
GAMMA_RANGE = (0.85, 1.15)
BLUR_PROBABILITY = 1 / 7
BLUR_SIGMA_RANGE = (0.4, 1.5)  # pixels of the resized image
TINT_RANGE = (0.0, 0.2)
MAX_PATCHES = 4
PATCH_RANGE = (0.05, 0.2)  # of the image's side

LUMA = np.array([0.299, 0.587, 0.114])
INTENSITY = np.arange(256) / 255.0


@dataclass(frozen=True)
class Patch:
    """A filled rectangle, in fractions of the image's height and width."""

    top: float
    left: float
    height: float
    width: float
    color: tuple[int, int, int]

    def window(self, hw: tuple[int, int]) -> tuple[int, int, int, int]:
        """(top, left, height, width) in pixels of an image of ``hw``."""
        height, width = hw
        return int(self.top * height), int(self.left * width), int(self.height * height), int(self.width * width)


@dataclass(frozen=True)
class ImageAugmentation:
    """What one camera's frames go through; fields that are None or empty do nothing."""

    crop: tuple[float, float, float] | None = None  # side kept, then top and left as a share of what is cut
    tone: np.ndarray | None = None  # (256,) uint8, brightness, contrast and gamma in one table
    color: np.ndarray | None = None  # (3, 3) float32, saturation
    blur_sigma: float | None = None
    tint: tuple[float, tuple[int, int, int]] | None = None  # strength, RGB
    patches: tuple[Patch, ...] = ()

    @property
    def crop_only(self) -> "ImageAugmentation":
        """The part that moves the geometry, without the colours."""
        return ImageAugmentation(crop=self.crop)

    def crop_window(self, hw: tuple[int, int]) -> tuple[int, int, int, int]:
        """(top, left, height, width) of the part that is kept of an image of ``hw``."""
        if self.crop is None:
            return 0, 0, *hw
        side, top, left = self.crop
        height, width = max(1, round(side * hw[0])), max(1, round(side * hw[1]))
        return round(top * (hw[0] - height)), round(left * (hw[1] - width)), height, width

    @property
    def lookup(self) -> np.ndarray | None:
        """(256, 3) uint8 per RGB channel: tint, then tone, in one table; None where neither is drawn."""
        if self.tone is None and self.tint is None:
            return None
        table = np.repeat(np.arange(256, dtype=np.uint8)[:, None], 3, axis=1)
        if self.tint is not None:
            strength, color = self.tint
            table = (table * (1 - strength) + strength * np.array(color)).astype(np.uint8)
        return table if self.tone is None else self.tone[table]

    def recolor(self, image: np.ndarray) -> np.ndarray:
        """(H, W, 3) uint8 RGB to the same; geometry is untouched and the input is not written to."""
        if self.patches:
            image = np.ascontiguousarray(image).copy()
            for patch in self.patches:
                top, left, height, width = patch.window(image.shape[:2])
                image[top : top + height, left : left + width] = patch.color
        lookup = self.lookup
        if lookup is not None:
            image = cv2.LUT(image, lookup[:, None])
        if self.color is not None:
            image = cv2.transform(image, self.color)
        if self.blur_sigma is not None:
            image = cv2.GaussianBlur(image, (0, 0), self.blur_sigma)
        return image


NO_AUGMENTATION = ImageAugmentation()


def draw_augmentation(config: DataConfig, camera: str, rng: np.random.Generator) -> ImageAugmentation:
    """Draw what happens to ``camera``'s frames in one training sample; wrist cameras are never cropped."""
    crop = tone = color = blur_sigma = tint = None
    patches: tuple[Patch, ...] = ()
    if config.aug_crop and camera not in config.wrist_cameras:
        crop = (rng.uniform(*CROP_RANGE), rng.uniform(), rng.uniform())
    if config.aug_color:
        tone = tone_table(rng.uniform(*COLOR_RANGE), rng.uniform(*COLOR_RANGE), rng.uniform(*GAMMA_RANGE))
        color = saturation_matrix(rng.uniform(*COLOR_RANGE))
    if config.aug_blur and rng.uniform() < BLUR_PROBABILITY:
        blur_sigma = rng.uniform(*BLUR_SIGMA_RANGE)
    if config.aug_background:
        tint = (rng.uniform(*TINT_RANGE), _draw_color(rng))
        patches = tuple(_draw_patch(rng) for _ in range(rng.integers(MAX_PATCHES + 1)))
    return ImageAugmentation(crop, tone, color, blur_sigma, tint, patches)


def tone_table(brightness: float, contrast: float, gamma: float) -> np.ndarray:
    """(256,) uint8: scale by brightness, spread about mid-grey by contrast, then gamma."""
    value = np.clip((INTENSITY * brightness - 0.5) * contrast + 0.5, 0.0, 1.0) ** gamma
    return np.rint(value * 255).astype(np.uint8)


def saturation_matrix(saturation: float) -> np.ndarray:
    """(3, 3) float32 on RGB columns: 0 is grey, 1 changes nothing."""
    return (saturation * np.eye(3) + (1 - saturation) * LUMA[None]).astype(np.float32)


def _draw_color(rng: np.random.Generator) -> tuple[int, int, int]:
    return tuple(rng.integers(0, 256, 3).tolist())


def _draw_patch(rng: np.random.Generator) -> Patch:
    height, width = rng.uniform(*PATCH_RANGE, 2)
    return Patch(rng.uniform(0, 1 - height), rng.uniform(0, 1 - width), height, width, _draw_color(rng))
