"""Lines of text under and over images."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
from matplotlib import font_manager
from PIL import Image, ImageDraw, ImageFont

Color = tuple[int, int, int]  # RGB
BACKGROUND: Color = (24, 26, 30)
TEXT: Color = (236, 238, 242)
FAINT: Color = (160, 166, 176)
MARGIN = 6  # pixels left and right


def text_band(width: int, lines: Sequence[tuple[str, int, Color]]) -> np.ndarray:
    """Lines of text (text, font size, colour) on the background, broken where too long; (h, width, 3) uint8."""
    parts = [(part, size, color) for text, size, color in lines for part in broken(text, size, width - 2 * MARGIN)]
    height = sum(size + 8 for _, size, _ in parts) + 4
    band = Image.new("RGB", (width, height), BACKGROUND)
    draw, y = ImageDraw.Draw(band), 4
    for text, size, color in parts:
        draw.text((MARGIN, y), text, color, _font(size))
        y += size + 8
    return np.asarray(band)


def broken(text: str, size: int, width: int) -> list[str]:
    """A text's lines of at most ``width`` pixels at a font size, broken between words."""
    parts, font = [""], _font(size)
    for word in text.split():
        longer = f"{parts[-1]} {word}".strip()
        if parts[-1] and font.getlength(longer) > width:
            parts.append(word)
        else:
            parts[-1] = longer
    return parts


@functools.cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(font_manager.findfont("DejaVu Sans"), size)
