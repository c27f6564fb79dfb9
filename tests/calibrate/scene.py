"""A board, a robot and cameras whose places are known, and what the cameras see of them."""

from __future__ import annotations

import csv
from pathlib import Path

import cv2
import numpy as np
from scipy.spatial.transform import Rotation

from data_utils.calibrate.board import Board
from data_utils.calibrate.page import PX_PER_MM
from data_utils.calibrate.views import View, inverse, project_distorted

SIZE = (640, 480)  # width, height
K = np.array([[610.0, 0.0, 322.0], [0.0, 608.0, 237.0], [0.0, 0.0, 1.0]])
NONE = np.zeros(0)
BARREL = np.array([-0.28, 0.09, 0.001, -0.0008])
BOARD = Board()
SMALL = Board("charuco", (5, 7), 20.0, 15.0, "5X5_100")
_FINER = 3  # times the pixels of a rendered image


def pose(position, rotvec_degrees) -> np.ndarray:
    out = np.eye(4)
    out[:3, :3] = Rotation.from_rotvec(rotvec_degrees, degrees=True).as_matrix()
    out[:3, 3] = position
    return out


def looks_at(eye, target) -> np.ndarray:
    """``world_from_cam`` of a camera at ``eye`` that looks at ``target``, upright in a world whose z points up."""
    eye, target = np.asarray(eye, float), np.asarray(target, float)
    forward = (target - eye) / np.linalg.norm(target - eye)
    right = np.cross(forward, (0, 0, 1))
    right /= np.linalg.norm(right)
    out = np.eye(4)
    out[:3, :3] = np.stack([right, np.cross(forward, right), forward], axis=1)
    out[:3, 3] = eye
    return out


def before_camera(board: Board, count: int, seed: int, tilt: float = 30.0, distance=(0.45, 0.75)) -> np.ndarray:
    """(N, 4, 4) cam_from_board: its middle near the image's, tilted to all sides by up to ``tilt`` degrees."""
    rng, middle = np.random.default_rng(seed), board.corners.mean(axis=0)
    out = []
    for _ in range(count):
        turn = rng.uniform(-1, 1, 3) * (tilt, tilt, 25.0)
        depth = rng.uniform(*distance)
        centre = np.array([rng.uniform(-0.2, 0.2), rng.uniform(-0.14, 0.14), 1.0]) * depth
        cam_from_board = pose(np.zeros(3), turn)
        cam_from_board[:3, 3] = centre - cam_from_board[:3, :3] @ middle
        out.append(cam_from_board)
    return np.stack(out)


def seen(board: Board, cam_from_board: np.ndarray, distortion=NONE, noise: float = 0.2, seed: int = 0) -> list[View]:
    """Views with the corners that fall into the image, with noise in pixels."""
    rng, views = np.random.default_rng(seed), []
    for index, placed in enumerate(cam_from_board):
        points = board.corners @ placed[:3, :3].T + placed[:3, 3]
        pixels = project_distorted(points, K, distortion)
        inside = (pixels > 3).all(-1) & (pixels < (SIZE[0] - 4, SIZE[1] - 4)).all(-1)
        noisy = pixels + noise * rng.normal(size=pixels.shape)
        views.append(View(f"img_{index:02d}.png", board.corners[inside], noisy[inside]))
    return views


def render(board: Board, squares: np.ndarray, cam_from_board: np.ndarray, distortion=NONE) -> np.ndarray:
    """(H, W, 3) uint8: the printed ``squares`` (h, w), with a white margin, as a camera sees them on grey."""
    margin = round(10 * PX_PER_MM)
    paper = cv2.copyMakeBorder(squares, *[margin] * 4, cv2.BORDER_CONSTANT, value=255)
    paper = cv2.resize(paper, None, fx=0.25, fy=0.25, interpolation=cv2.INTER_AREA)
    per_px = 4 / PX_PER_MM / 1000  # metres
    # Pixels of the paper, whose centres are whole numbers, to metres on the board.
    shift = -margin / PX_PER_MM / 1000 + per_px / 2
    board_from_paper = np.array([[per_px, 0, shift], [0, per_px, shift], [0, 0, 1]])
    half = (_FINER - 1) / 2
    finer = np.array([[_FINER, 0, half], [0, _FINER, half], [0, 0, 1.0]])
    H = finer @ K @ cam_from_board[:3, [0, 1, 3]] @ board_from_paper
    width, height = (side * _FINER for side in SIZE)
    image = cv2.warpPerspective(paper, H, (width, height), flags=cv2.INTER_AREA, borderValue=128)
    if distortion.any():
        x, y = np.meshgrid(np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32))
        pixels = (np.stack([x, y], -1).reshape(-1, 1, 2) - half) / _FINER
        straight = cv2.undistortPoints(pixels.astype(np.float64), K, distortion, P=K).reshape(height, width, 2)
        there = (straight * _FINER + half).astype(np.float32)
        image = cv2.remap(image, there[..., 0], there[..., 1], cv2.INTER_LINEAR, borderValue=128)
    image = cv2.resize(image, SIZE, interpolation=cv2.INTER_AREA)
    return np.repeat(image[..., None], 3, axis=2)


WORLD_FROM_CAM = looks_at((0.9, 0.25, 0.75), (0.35, 0.0, 0.25))
EE_FROM_BOARD = pose((-0.06, -0.05, 0.04), (12.0, -7.0, 100.0))
EE_FROM_CAM = pose((0.03, -0.06, -0.1), (-14.0, 4.0, 88.0))
WORLD_FROM_BOARD = pose((0.5, 0.1, 0.02), (176.0, 8.0, 3.0))


def fixed_poses(cam_from_board: np.ndarray) -> np.ndarray:
    """(N, 4, 4) world_from_ee of a gripper that holds the board there."""
    return WORLD_FROM_CAM @ cam_from_board @ inverse(EE_FROM_BOARD)


def wrist_poses(cam_from_board: np.ndarray) -> np.ndarray:
    """(N, 4, 4) world_from_ee of a gripper whose camera sees the board there."""
    return WORLD_FROM_BOARD @ inverse(cam_from_board) @ inverse(EE_FROM_CAM)


def write_poses(path: Path, world_from_ee: np.ndarray) -> None:
    """A CSV of poses (N, 4, 4) of the pictures img_00.png, img_01.png, ..."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow("picture,x,y,z,qx,qy,qz,qw".split(","))
        for index, placed in enumerate(world_from_ee):
            quaternion = Rotation.from_matrix(placed[:3, :3]).as_quat()
            writer.writerow([f"img_{index:02d}.png", *placed[:3, 3], *quaternion])
