"""Whether a matrix is that of a pinhole camera, and of one whose images have a given size."""

from __future__ import annotations

import numpy as np

_EXACT = 1e-4  # of the focal length: float32 and hand-written matrices
_SHORTEST = 0.05  # focal length as a share of the image's side: a view of 169 degrees

Size = tuple[int, int]  # height and width


def intrinsics_fault(K: np.ndarray, hw: Size | None = None) -> tuple[int, str] | None:
    """Index and description of the first that is no pinhole camera ``[[fx, 0, cx], [0, fy, cy], [0, 0, 1]]``, or None.

    Args:
        K: (N, 3, 3).
        hw: of the decoded images that it belongs to; None: not known yet.
    """
    matrices = np.asarray(K, np.float64)
    if len(matrices) > 1 and (matrices == matrices[0]).all():  # as of most cameras, and quickly told
        matrices = matrices[:1]
    for index, matrix in enumerate(matrices):
        fault = _fault(matrix, hw)
        if fault is not None:
            return index, fault
    return None


def off_centre(K: np.ndarray, hw: Size) -> str | None:
    """What is unusual about a principal point of (3, 3) outside the middle half of the image, or None."""
    height, width = hw
    x, y = float(K[0, 2]), float(K[1, 2])
    # The border is out: there lies the middle of images half or one and a half times as large.
    if width / 4 < x < width * 3 / 4 and height / 4 < y < height * 3 / 4:
        return None
    return f"principal point ({x:.4g}, {y:.4g}) is far from the middle of the image of {width} x {height}"


def _fault(K: np.ndarray, hw: Size | None) -> str | None:
    if not np.isfinite(K).all():
        return "is not finite"
    last = K[2].tolist()
    if np.abs(K[2] - (0, 0, 1)).max() > 1e-6:
        why = ""
        if last[:2] == [0, 0] and last[2] != 0:
            why = f"; divided by {last[2]:g} it is the same camera"
        elif (K[:2, 2] == 0).all():
            why = "; is it transposed?"
        return f"has the last row {last}; wanted [0, 0, 1]{why}"
    fx, fy = float(K[0, 0]), float(K[1, 1])
    if not (fx > 0 and fy > 0):
        return f"has focal lengths {fx:g} and {fy:g}; wanted numbers above 0, in pixels"
    shear = max(abs(float(K[0, 1])), abs(float(K[1, 0])))
    if shear > _EXACT * min(fx, fy):
        return f"has {shear:g} beside the focal lengths, a sheared image; wanted 0 there"
    if hw is None:
        return None
    height, width = hw
    if fx < _SHORTEST * width or fy < _SHORTEST * height:
        which = f"has focal lengths {fx:g} and {fy:g} for an image of {width} x {height} pixels"
        return f"{which}; is it in units of the image's size? Wanted pixels"
    x, y = float(K[0, 2]), float(K[1, 2])
    if not (0 <= x <= width and 0 <= y <= height):
        where = f"has its principal point ({x:.4g}, {y:.4g}) outside the image of {width} x {height}"
        return f"{where}; does it belong to images of this size?"
    return None
