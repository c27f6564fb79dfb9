"""Words for places in a picture, which a small vision-language model answers with."""

from __future__ import annotations


def place_words(bins: int) -> list[str]:
    """All of them: ``<x0>`` to the right, then ``<y0>`` downwards."""
    return [f"<{axis}{number}>" for axis in "xy" for number in range(bins)]


def where_words(place: tuple[float, float], bins: int) -> str:
    """Those for a place, given as shares of the picture's width and height."""
    return "".join(f"<{axis}{int(share * bins)}>" for axis, share in zip("xy", place, strict=True))
