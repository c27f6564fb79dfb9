"""The commands and mapping files of docs/convert.md work as they are written."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import h5py
import numpy as np
import pytest

from data_utils.convert.__main__ import main as convert
from data_utils.export.__main__ import main as export
from data_utils.h5io import Episode
from tests.convert import datasets

DOC = Path(__file__).parents[2] / "docs/convert.md"
COMMANDS = {"data_utils.convert": convert, "data_utils.export": export}


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """The files that the document speaks of: its own, and recordings with the columns it names."""
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```(\w+)\n(.*?)```", DOC.read_text(), re.DOTALL)
    for language, text in blocks:
        if language == "yaml":
            Path(re.match(r"# (\S+)", text)[1]).write_text(text)
        if language == "json":
            Path("calibration").mkdir()
            Path("calibration/wrist.json").write_text(text)
    state = np.tile(np.float32([0.4, 0, 0.3, 1, 0, 0, 0, 0.04]), (6, 1))
    state[:, 0] += 0.01 * np.arange(6)
    videos = {f"observation.images.{name}": datasets.frames(6, size=(48, 64)) for name in ("front", "wrist")}
    datasets.write_v30(Path("recordings/cups"), [datasets.Episode({"observation.state": state}, videos)])
    with h5py.File("lift.hdf5", "w") as file:
        file["data/demo_0/actions"] = np.zeros((6, 7))
        file["data/demo_0/obs/robot0_eef_pos"] = state[:, :3]
        file["data/demo_0/obs/robot0_eef_quat"] = state[:, 3:7]
        file["data/demo_0/obs/robot0_gripper_qpos"] = np.tile([0.02, -0.02], (6, 1))
        file["data/demo_0/obs/agentview_image"] = datasets.frames(6)
        file["mask/train"] = np.array([b"demo_0"])
    return tmp_path


def test_every_command_of_the_document_runs(folder):
    text = DOC.read_text().replace("\\\n", " ")
    commands = [line for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]
    commands = [shlex.split(command) for command in commands if "..." not in command]
    assert len(commands) == 4
    for python, dash_m, module, *arguments in commands:
        assert (python, dash_m) == ("python", "-m")
        assert COMMANDS[module](arguments) == 0, arguments

    with Episode("data/cups/chunk-000/episode_000000.h5") as episode:
        # The recorded pose is the flange's; the end-effector is 0.1 m further along its z, which looks down.
        np.testing.assert_allclose(episode.world_from_ee[2, 0, :3, 3], [0.42, 0, 0.2], atol=1e-6)
        np.testing.assert_allclose(episode.world_from_cam("hand_cam", 2)[:3, 3], [0.42, 0.06, 0.32], atol=1e-6)
        assert (np.array(episode.world_from_cam("head_cam", 0)[:3, 2])[[0, 2]] < 0).all()  # back at the robot, down
        np.testing.assert_allclose(episode.gripper, 0.5, atol=1e-6)
        with Episode("data/cups_again/chunk-000/episode_000000.h5") as again:
            np.testing.assert_array_equal(again.world_from_ee, episode.world_from_ee)
    with Episode("data/lift/lift/demo_000000.h5") as episode:
        assert (episode.world_from_cam("agentview", 0)[[0, 2], [2, 2]] < 0).all()


def test_every_preset_is_in_the_document():
    named = set(re.findall(r"`(\w+)`", DOC.read_text().split("## Presets")[1].split("##")[0]))
    presets = {path.stem for path in (DOC.parents[1] / "data_utils/convert/presets").glob("*.yaml")}
    assert presets <= named
