"""robomimic files become episodes by the same mapping files."""

from __future__ import annotations

import json
from pathlib import Path

import h5py
import numpy as np
import pytest
import yaml
from scipy.spatial.transform import Rotation

from data_utils.convert.__main__ import main
from data_utils.convert.robomimic import RobomimicConverter, RobomimicSettings
from data_utils.convert.runner import run
from data_utils.h5io import Episode

T = 5
MAPPING = {
    "time_step": 0.05,
    "prompts": [{"text": "lift the cube"}],
    "arms": [
        {
            "name": "arm",
            "pose": {"form": "xyz+quat", "order": "xyzw", "values": ["obs/robot0_eef_pos", "obs/robot0_eef_quat"]},
            "gripper": {"values": "obs/robot0_gripper_qpos[0]", "closed": 0.0, "open": 0.04},
        }
    ],
    "cameras": {
        "agentview": {
            "frames": "obs/agentview_image",
            "K": {"form": "fovy", "values": 45.0},
            "axes": "opengl",
            "world_from_cam": {
                "form": "xyz+quat",
                "order": "wxyz",
                "values": [0.5, 0, 1.35, 0.653, 0.271, 0.271, 0.653],
            },
            "flip_rows": True,
        }
    },
}


def image(demo: int, t: int) -> np.ndarray:
    """(32, 40, 3): the upper rows of the scene are brighter."""
    out = np.full((32, 40, 3), 40 + 20 * t + demo, np.uint8)
    out[:8] += 60
    return out


def quaternion(demo: int) -> np.ndarray:
    return Rotation.random(T, random_state=demo).as_quat()


@pytest.fixture
def source(tmp_path) -> Path:
    path = tmp_path / "lift.hdf5"
    with h5py.File(path, "w") as file:
        file.create_group("data").attrs["env_args"] = json.dumps({"env_kwargs": {"control_freq": 20}})
        for demo in range(3):
            group = file.create_group(f"data/demo_{demo}")
            group.attrs["num_samples"] = T
            group["actions"] = np.zeros((T, 7))
            group["obs/robot0_eef_pos"] = np.full((T, 3), 0.1 * demo)
            group["obs/robot0_eef_quat"] = quaternion(demo)
            group["obs/robot0_gripper_qpos"] = np.tile([0.02, -0.02], (T, 1))
            group["obs/agentview_image"] = np.stack([image(demo, t)[::-1] for t in range(T)])  # MuJoCo's row order
        file["mask/valid"] = np.array([b"demo_2"])
    return path


def mapping_file(tmp_path: Path, **changes) -> str:
    path = tmp_path / "mapping.yaml"
    path.write_text(yaml.safe_dump(MAPPING | changes))
    return str(path)


def test_demonstrations_become_episodes(source, tmp_path):
    summary = run(RobomimicConverter(RobomimicSettings(source, mapping_file(tmp_path))), tmp_path / "out", 2, {})
    assert (summary.converted, summary.failed) == (3, [])
    with Episode(tmp_path / "out/lift/demo_000001.h5") as episode:
        np.testing.assert_allclose(episode.timestamps, 0.05 * np.arange(T))
        np.testing.assert_allclose(
            episode.world_from_ee[:, 0, :3, :3], Rotation.from_quat(quaternion(1)).as_matrix(), atol=1e-6
        )
        assert (episode.gripper == 0.5).all() and episode.prompts == ["lift the cube"]
        focal = 16 / np.tan(np.radians(22.5))
        np.testing.assert_allclose(episode.K("agentview", 0), [[focal, 0, 20], [0, focal, 16], [0, 0, 1]], rtol=1e-6)
        assert episode.world_from_cam("agentview", 0)[2, 2] < 0  # looks down
        assert np.abs(episode.rgb("agentview", 2).astype(int) - image(1, 2)).max() <= 4


def test_a_filter_key_chooses_demonstrations(source, tmp_path):
    converter = RobomimicConverter(RobomimicSettings(source, mapping_file(tmp_path), filter_key="valid"))
    assert [job.name for job in converter.jobs()] == ["lift/demo_000002"]


def test_a_faster_recording_is_thinned_to_the_rate_wanted(source, tmp_path):
    converter = RobomimicConverter(RobomimicSettings(source, mapping_file(tmp_path, rate=10)))
    episode = converter.convert(converter.jobs()[0])
    np.testing.assert_allclose(episode.timestamp, [0, 0.1, 0.2])
    np.testing.assert_array_equal(episode.cameras["agentview"].frames[1], image(0, 2))


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        (["--filter-key", "test"], "has no filter key 'test'; there are valid"),
        (["--src", "/nowhere.hdf5"], "/nowhere.hdf5: no HDF5 file there"),
    ],
)
def test_a_wrong_source_is_answered_in_one_line(settings, complaint, source, tmp_path, capsys):
    command = ["robomimic", "--out", str(tmp_path / "out"), "--mapping", mapping_file(tmp_path)]
    command += settings if "--src" in settings else ["--src", str(source), *settings]
    assert main(command) == 2
    said = capsys.readouterr().err
    assert complaint in said and said.count("\n") == 1


def test_wrong_datasets_fail_by_name(source, tmp_path):
    with h5py.File(source, "r+") as file:
        del file["data/demo_0/obs/agentview_image"]
        file["data/demo_0/obs/agentview_image"] = np.zeros((T, 32, 40), np.uint8)
        del file["data/demo_1/obs/robot0_eef_quat"]
    summary = run(RobomimicConverter(RobomimicSettings(source, mapping_file(tmp_path))), tmp_path / "out", 1, {})
    assert summary.converted == 1
    messages = [failure.message for failure in summary.failed]
    assert "wanted (5, H, W, 3) uint8" in messages[0] and "no column 'obs/robot0_eef_quat'" in messages[1]
