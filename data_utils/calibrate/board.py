"""A calibration board: what is on it, and where its corners are in an image.

A board's frame has its origin in the upper left corner of the printed squares, x to the right, y down and z into the
paper, as OpenCV's boards have it; corners are those between squares.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import yaml

from data_utils.errors import DataError
from data_utils.files import write_text
from data_utils.yaml_file import read_yaml

KINDS = ("charuco", "checkerboard")
DICTIONARIES = tuple(f"{bits}X{bits}_{count}" for bits in (4, 5, 6, 7) for count in (50, 100, 250, 1000))
FEWEST_CORNERS = 6  # of a view: with fewer, one wrong corner turns the board


@dataclass(frozen=True)
class Board:
    """What is printed.

    Args:
        kind: one of :data:`KINDS`. A checkerboard must be seen whole, a ChArUco board in part.
        squares: columns and rows; squares are counted, not the corners between them.
        square_mm: side of a square, as measured on the paper.
        marker_mm: side of a ChArUco board's marker.
        dictionary: of its markers, one of :data:`DICTIONARIES`.
    Raises:
        ValueError: what is wrong.
    """

    kind: str = "charuco"
    squares: tuple[int, int] = (7, 10)
    square_mm: float = 25.0
    marker_mm: float | None = 19.0
    dictionary: str | None = "5X5_100"

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind is {self.kind!r}; wanted one of {', '.join(KINDS)}")
        if min(self.squares) < 4:
            raise ValueError(f"squares are {list(self.squares)}; wanted at least 4 columns and 4 rows")
        if not self.square_mm > 0:
            raise ValueError(f"square_mm is {self.square_mm:g}; wanted the side of a square in millimetres")
        if self.kind == "checkerboard":
            return
        if self.dictionary not in DICTIONARIES:
            raise ValueError(f"dictionary is {self.dictionary!r}; wanted one of {', '.join(DICTIONARIES)}")
        if self.marker_mm is None or not 0.4 * self.square_mm < self.marker_mm < self.square_mm:
            what = f"marker_mm is {self.marker_mm}; wanted less than square_mm, {self.square_mm:g}"
            raise ValueError(f"{what}, and more than 0.4 of it")
        wanted, there = self.squares[0] * self.squares[1] // 2, int(self.dictionary.split("_")[1])
        if wanted > there:
            raise ValueError(
                f"dictionary {self.dictionary} has {there} markers, the board wants {wanted}; name another"
            )

    @property
    def corners(self) -> np.ndarray:
        """(N, 3) metres in the board's frame, row by row."""
        columns, rows = self.squares
        grid = np.stack(np.meshgrid(np.arange(1, columns), np.arange(1, rows)), axis=-1).reshape(-1, 2)
        return np.hstack([grid * self.square_mm / 1000, np.zeros((len(grid), 1))])

    @property
    def has_one_way_up(self) -> bool:
        """Whether it looks otherwise when it is turned by half a turn."""
        return self.kind == "charuco" or sum(self.squares) % 2 == 1

    def find(self, image: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
        """Which corners (n,) an image (H, W, 3) uint8 RGB shows, and where: (n, 2) pixels; None where too few."""
        gray = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY) if image.ndim == 3 else image
        return self._find_charuco(gray) if self.kind == "charuco" else self._find_checkerboard(gray)

    def charuco(self) -> cv2.aruco.CharucoBoard:
        """OpenCV's, in metres."""
        dictionary = cv2.aruco.getPredefinedDictionary(getattr(cv2.aruco, f"DICT_{self.dictionary}"))
        return cv2.aruco.CharucoBoard(self.squares, self.square_mm / 1000, self.marker_mm / 1000, dictionary)

    def _find_charuco(self, gray: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
        pixels, ids, _, _ = cv2.aruco.CharucoDetector(self.charuco()).detectBoard(gray)
        if ids is None or len(ids) < FEWEST_CORNERS:
            return None
        ids, pixels = np.asarray(ids).reshape(-1), np.asarray(pixels, np.float64).reshape(-1, 2)
        on_a_line = any(len(set(part.tolist())) < 2 for part in np.divmod(ids, self.squares[0] - 1))
        return None if on_a_line else (ids, pixels)

    def _find_checkerboard(self, gray: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
        columns, rows = self.squares[0] - 1, self.squares[1] - 1
        found, pixels = cv2.findChessboardCornersSB(gray, (columns, rows), flags=cv2.CALIB_CB_ACCURACY)
        if not found:
            return None
        grid = np.asarray(pixels, np.float64).reshape(rows, columns, 2)
        right, down = grid[0, -1] - grid[0, 0], grid[-1, 0] - grid[0, 0]
        if right[0] * down[1] - right[1] * down[0] < 0:
            grid = grid[::-1]  # no paper is seen from behind
        if self.has_one_way_up and not self._begins_black(gray, grid):
            grid = grid[::-1, ::-1]
        return np.arange(columns * rows), grid.reshape(-1, 2)

    def _begins_black(self, gray: np.ndarray, grid: np.ndarray) -> bool:
        """Whether the square between the first four corners has the colour of the first one, black."""
        first = cv2.getRectSubPix(gray, (3, 3), grid[:2, :2].mean((0, 1)).astype(np.float32).tolist())
        second = cv2.getRectSubPix(gray, (3, 3), grid[:2, 1:3].mean((0, 1)).astype(np.float32).tolist())
        return bool(first.mean() < second.mean())


def read_board(path: Path) -> Board:
    """Raises DataError: no such file, or what is wrong in it, with its line."""
    try:
        return read_yaml(path).build(Board)
    except OSError as error:
        what = f"cannot be read ({error.strerror}); python -m data_utils.calibrate board makes a board and its YAML"
        raise DataError(f"{path}: {what}", "file") from error
    except ValueError as error:
        raise DataError(str(error), "schema") from error


def write_board(path: Path, board: Board) -> None:
    values = dataclasses.asdict(board) | {"squares": list(board.squares)}
    if board.kind == "checkerboard":
        del values["marker_mm"], values["dictionary"]
    head = "# A printed board. Measure 10 squares on the paper, and correct square_mm (and marker_mm with it).\n"
    write_text(path, head + yaml.safe_dump(values, sort_keys=False, default_flow_style=None))
