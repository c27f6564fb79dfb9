"""A page to print a board from, true to the millimetre."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from data_utils.calibrate.board import Board
from data_utils.files import atomic_write

PAPERS = {"a4": (210.0, 297.0), "a3": (297.0, 420.0), "letter": (215.9, 279.4)}  # millimetres, upright
SUFFIXES = (".pdf", ".png")
PX_PER_MM = 20  # 508 dpi: sizes in steps of 0.05 mm are whole pixels
_RULER = 100  # millimetres
_FOOT = 14.0  # millimetres below the board for the ruler and the words


def draw_page(board: Board, paper: str) -> np.ndarray:
    """(H, W) uint8, :data:`PX_PER_MM`, black on white: the board, a ruler, and what to do.

    Raises:
        ValueError: sizes in finer steps than a pixel's, or a board that is larger than the paper.
    """
    from PIL import Image, ImageDraw

    for name in ("square_mm", "marker_mm") if board.kind == "charuco" else ("square_mm",):
        pixels = getattr(board, name) * PX_PER_MM
        if abs(pixels - round(pixels)) > 1e-6:
            raise ValueError(f"{name} is {getattr(board, name):g}; wanted a multiple of {1 / PX_PER_MM} to be printed")
    size = np.array(board.squares) * board.square_mm
    sheet = np.array(PAPERS[paper])
    if size[0] > size[1]:
        sheet = sheet[::-1]
    if (size + (10, 10 + _FOOT) > sheet).any():
        room = sheet - (10, 10 + _FOOT)
        what = f"the board is {size[0]:g} x {size[1]:g} mm, {paper} has room for {room[0]:g} x {room[1]:g}"
        raise ValueError(f"{what}; take a smaller square_mm, fewer squares or larger paper")
    width, height = np.round(sheet * PX_PER_MM).astype(int)
    page = np.full((height, width), 255, np.uint8)
    left, top = np.round((sheet - size - (0, _FOOT)) / 2 * PX_PER_MM).astype(int)
    squares = _squares(board)
    page[top : top + len(squares), left : left + squares.shape[1]] = squares

    image = Image.fromarray(page)
    draw, y = ImageDraw.Draw(image), top + len(squares) + 4 * PX_PER_MM
    end = left + _RULER * PX_PER_MM
    draw.rectangle((left, y, end - 1, y + 5), 0)
    for x in (left, end - 6):
        draw.rectangle((x, y - 20, x + 5, y + 25), 0)
    kind = f"ChArUco {board.dictionary}, markers {board.marker_mm:g} mm" if board.kind == "charuco" else "checkerboard"
    words = (
        f"{board.squares[0]} x {board.squares[1]} squares of {board.square_mm:g} mm, {kind}. The line is {_RULER} mm:"
    )
    font = _font(3 * PX_PER_MM)
    draw.text((left, y + 1.5 * PX_PER_MM), words, 0, font)
    draw.text((left, y + 5 * PX_PER_MM), "print at 100 %, measure it, and glue the paper to something flat.", 0, font)
    return np.asarray(image)


def write_page(path: Path, page: np.ndarray) -> None:
    """A PDF or PNG that says how large it is. Raises ``OSError``."""
    from PIL import Image

    dpi = PX_PER_MM * 25.4
    image = Image.fromarray(page)
    if path.suffix == ".pdf":
        # Black and white, which a PDF holds without loss; greys would become a JPEG.
        atomic_write(path, lambda temporary: image.convert("1").save(temporary, format="PDF", resolution=dpi))
    else:
        atomic_write(path, lambda temporary: image.save(temporary, format="PNG", dpi=(dpi, dpi)))


def _squares(board: Board) -> np.ndarray:
    """(H, W) uint8 of the board alone, :data:`PX_PER_MM`."""
    side = round(board.square_mm * PX_PER_MM)
    columns, rows = board.squares
    if board.kind == "charuco":
        return board.charuco().generateImage((columns * side, rows * side), marginSize=0, borderBits=1)
    white = (np.arange(rows)[:, None] + np.arange(columns)) % 2 == 1
    return np.kron(white, np.ones((side, side), np.uint8)).astype(np.uint8) * 255


def _font(pixels: int):
    from matplotlib import font_manager
    from PIL import ImageFont

    return ImageFont.truetype(font_manager.findfont("DejaVu Sans"), pixels)
