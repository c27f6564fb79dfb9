"""A picture of where in the image a board was seen, and how well the lens explains it."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np

from data_utils.calibrate.intrinsics import Lens
from data_utils.calibrate.views import View

_WIDTH = 960  # pixels of the picture
_OUTLINE, _OUTLIER = (90, 150, 255), (255, 64, 200)


def coverage_picture(views: Sequence[View], lens: Lens, size: tuple[int, int], title: str) -> np.ndarray:
    """(H, W, 3) uint8: every corner of every view, green to red by the view's error; outliers are pink."""
    from data_utils.drawing.captions import BACKGROUND, FAINT, TEXT, text_band

    scale = _WIDTH / size[0]
    canvas = np.full((round(size[1] * scale), _WIDTH, 3), BACKGROUND, np.uint8)
    for part in range(1, 4):
        cv2.line(canvas, (part * _WIDTH // 4, 0), (part * _WIDTH // 4, canvas.shape[0]), (60, 60, 60))
        cv2.line(canvas, (0, part * canvas.shape[0] // 4), (_WIDTH, part * canvas.shape[0] // 4), (60, 60, 60))
    corners = np.concatenate([view.pixels for view in views]).astype(np.float32)
    cv2.polylines(canvas, [np.round(cv2.convexHull(corners) * scale).astype(int)], True, _OUTLINE, 2, cv2.LINE_AA)
    for view, px, used in zip(views, lens.view_px, lens.used, strict=True):
        share = min(1.0, px)  # red from a pixel on
        color = (int(255 * share), int(220 * (1 - share)), 60) if used else _OUTLIER
        for corner in np.round(view.pixels * scale * 16).astype(int):
            cv2.circle(canvas, corner.tolist(), 3 * 16, color, -1, cv2.LINE_AA, 4)
    legend = (
        f"Corners of {len(views)} pictures, green (0 px) to red (1 px and more) by their picture's error, "
        f"pink: left out. The outline covers {lens.covered:.0%} of the image; outside it the lens is guessed."
    )
    bands = text_band(_WIDTH, [(title, 17, TEXT)]), text_band(_WIDTH, [(legend, 13, FAINT)])
    return np.concatenate([bands[0], canvas, bands[1]])
