"""docs/calibration.md does what it says: its commands and its code are run as they stand."""

from __future__ import annotations

import csv
import re
import shlex
import shutil
from pathlib import Path

import cv2
import numpy as np

from apt.infer.frames import parse_camera
from data_utils.calibrate.__main__ import main as calibrate
from data_utils.calibrate.tables import read_poses
from data_utils.calibrate.views import inverse, project_distorted
from data_utils.h5io import Episode, EpisodeWriter
from data_utils.inspect.__main__ import main as inspect
from data_utils.rig import read_rig
from tests.calibrate import scene
from tests.calibrate.scene import BARREL, WORLD_FROM_CAM, K, pose, write_poses

DOC = Path(__file__).parents[2] / "docs/calibration.md"
COMMANDS = {"data_utils.calibrate": calibrate, "data_utils.inspect": inspect}


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", DOC.read_text(encoding="utf-8"), re.DOTALL)


def record(path: Path) -> None:
    """An episode whose gripper is where both cameras' poses are of."""
    rng = np.random.default_rng(0)
    path.parent.mkdir(parents=True)
    with EpisodeWriter(path, ["head_cam", "hand_cam"], 1, "wave") as episode:
        for time in range(30):
            world_from_ee = pose((0.4, 0, 0.25) + rng.uniform(-1, 1, 3) * (0.2, 0.25, 0.2), (7.0 * time, 4, 3))
            images = {name: np.full((480, 640, 3), 100, np.uint8) for name in ("head_cam", "hand_cam")}
            places = {"head_cam": WORLD_FROM_CAM, "hand_cam": world_from_ee @ scene.EE_FROM_CAM}
            episode.add_frame(
                time, world_from_ee[None], np.array([time / 30]), images, places, dict.fromkeys(images, K)
            )


def fill_in(table: Path, episode: Path) -> None:
    """What a person does: points at the gripper in every picture."""
    rows = list(csv.DictReader(table.open()))
    with Episode(episode) as recorded:
        points = recorded.world_from_ee[:, 0, :3, 3]
    cam_from_world = inverse(WORLD_FROM_CAM)
    pixels = project_distorted(points @ cam_from_world[:3, :3].T + cam_from_world[:3, 3], K, BARREL)
    with table.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(rows[0])
        writer.writerows([row["episode"], row["frame"], *pixels[int(row["frame"])].round()] for row in rows)


def test_every_command_runs_and_leads_to_the_cameras(shot, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("head_lens", "hand_lens", "head", "hand"):
        shutil.copytree(shot[0] / "pictures", tmp_path / "pictures" / name)
    write_poses(Path("head_poses.csv"), scene.fixed_poses(shot[1]))
    write_poses(Path("hand_poses.csv"), scene.wrist_poses(shot[1]))
    record(Path("data/cups/a.h5"))
    commands = [shlex.split(line, comments=True) for block in blocks("bash") for line in block.splitlines()]
    assert len(commands) == 8 and set(command[2] for command in commands) == set(COMMANDS)
    for python, dash_m, module, *arguments in commands:
        if "--marks" in arguments:
            fill_in(Path("marks/marks.csv"), Path("data/cups/a.h5"))
        assert (python, dash_m) == ("python", "-m") and COMMANDS[module](arguments) == 0, arguments
        if arguments[0] in ("wrist", "from-robot") and "--frames-to-mark" not in arguments:
            rig = read_rig("rig.yaml")
            head, hand = rig.camera("head_cam").world_from_cam, rig.camera("hand_cam").ee_from_cam
            assert np.linalg.norm(head[:3, 3] - WORLD_FROM_CAM[:3, 3]) < (0.004 if arguments[0] == "wrist" else 0.02)
            assert np.linalg.norm(hand[:3, 3] - scene.EE_FROM_CAM[:3, 3]) < 0.004
    assert cv2.imread("inspect_out/a/frames.png") is not None


def test_the_rig_and_the_code_of_the_document_do(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (rig,), (code,) = blocks("yaml"), blocks("python")
    Path("rig.yaml").write_text(rig)
    poses = Path("poses.csv")
    poses.write_text(blocks("csv")[0])
    assert list(read_poses(poses)) == ["img_00.png"]
    raw = np.full((480, 640, 3), 90, np.uint8)
    with EpisodeWriter("a.h5", ["head_cam", "hand_cam"], 1, "go") as episode:
        for time in range(2):
            names = {
                "raw": raw,
                "episode": episode,
                "world_from_ee": np.eye(4)[None],
                "time": time,
                "gripper": np.ones(1),
            }
            exec(code, names)
    frame = names["frame"]
    for name in ("head_cam", "hand_cam"):
        parse_camera(name, frame[name])
    with Episode("a.h5") as written:
        np.testing.assert_allclose(written.K("head_cam", 0), frame["head_cam"]["camera"]["K"], rtol=1e-6)
