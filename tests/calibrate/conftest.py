"""Rendered pictures that the tests of calibration share."""

from __future__ import annotations

import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest

from data_utils.calibrate import page
from data_utils.calibrate.__main__ import main
from data_utils.rig import RigCamera, write_rig
from tests.calibrate import scene


@pytest.fixture(scope="session")
def shot(tmp_path_factory) -> tuple[Path, np.ndarray]:
    """A folder of rendered pictures through a lens, the board's YAML, a rig with the true lens, and cam_from_board."""
    folder = tmp_path_factory.mktemp("shot")
    poses = scene.before_camera(scene.BOARD, 16, 5, tilt=35, distance=(0.33, 0.5))
    squares = page._squares(scene.BOARD)
    (folder / "pictures").mkdir()
    for index, placed in enumerate(poses):
        image = scene.render(scene.BOARD, squares, placed, scene.BARREL)
        cv2.imwrite(str(folder / f"pictures/img_{index:02d}.png"), image)
    assert main(["board", "--out", str(folder / "board.png")]) == 0
    lens = RigCamera(scene.SIZE, scene.K, scene.BARREL)
    write_rig(folder / "rig.yaml", {"front": lens, "hand": lens})
    return folder, poses


@pytest.fixture
def folder(shot, tmp_path, monkeypatch) -> Path:
    """A copy of it to work in."""
    shutil.copytree(shot[0], tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"
