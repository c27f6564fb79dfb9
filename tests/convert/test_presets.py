"""Every shipped mapping turns a dataset with just its columns into episodes that its dataset class reads."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from data_utils.convert.lerobot import LerobotConverter, LerobotSettings
from data_utils.convert.mapping import PRESETS, MappingError, load_mapping
from data_utils.datasets import DATASETS
from data_utils.h5io import Episode, write_episode
from tests.convert import datasets

T = 12
WXYZ = [1.0, 0.0, 0.0, 0.0]
K3 = [[300.0, 0, 32], [0, 300, 24], [0, 0, 1]]


def rows(*values: float) -> np.ndarray:
    """(T, n) float32; the first number grows by a centimetre a frame."""
    out = np.tile(np.array(values, np.float32), (T, 1))
    out[:, 0] += 0.01 * np.arange(T, dtype=np.float32)
    return out


def videos(*keys: str) -> dict[str, np.ndarray]:
    return {key: datasets.frames(T, seed) for seed, key in enumerate(keys)}


def droid(calibration: Path) -> datasets.Episode:
    cameras = ("wrist_left", "exterior_1_left", "exterior_2_left")
    focal = {camera: {"K": [520.0, 640.0, 520.0, 360.0]} for camera in cameras}
    (calibration / "episode_000000.json").write_text(json.dumps(focal))
    columns = {
        "is_episode_successful": np.full((T, 1), True),
        "language_instruction": ["put the cup on the plate"] * T,
        "language_instruction_2": [""] * T,
        "language_instruction_3": ["cup on plate"] * T,
        "observation.state.cartesian_position": rows(0.4, 0, 0.3, np.pi, 0, 0),
        "observation.state.gripper_position": np.linspace(0, 1, T, dtype=np.float32)[:, None],
    }
    for camera in cameras:
        columns[f"camera_extrinsics.{camera}"] = np.tile(np.float32([0.1, 0.5, 0.4, -2.0, 0.1, 0.2]), (T, 1))
    return datasets.Episode(columns, videos(*(f"observation.images.{camera}" for camera in cameras)), fps=15)


def interndata_a1_franka(calibration: Path) -> datasets.Episode:
    columns = {
        "states.tcp_to_robot_pose": rows(0.4, 0, 0.3, *WXYZ),
        "states.gripper.position": np.full((T, 1), 0.04, np.float32),
    }
    for camera in ("head", "hand"):
        columns[f"{camera}_camera_intrinsics"] = np.tile(np.float32([320, 320, 32, 24]), (T, 1))
        columns[f"{camera}_camera_to_robot_extrinsics"] = rows(1.0, 0, 0.5, *WXYZ)
    return datasets.Episode(columns, videos("images.rgb.head", "images.rgb.hand"), fps=30)


def interndata_a1_two_arms(calibration: Path) -> datasets.Episode:
    columns = {}
    for y, side in ((0.2, "left"), (-0.2, "right")):
        columns[f"states.{side}_tcp_to_robot_pose"] = rows(0.4, y, 0.3, *WXYZ)
        columns[f"states.{side}_gripper.position"] = np.zeros((T, 1), np.float32)
    for camera in ("head", "hand_left", "hand_right"):
        columns[f"{camera}_camera_intrinsics"] = np.tile(np.float32([320, 320, 32, 24]), (T, 1))
        columns[f"{camera}_camera_to_robot_extrinsics"] = rows(1.0, 0, 0.5, *WXYZ)
    return datasets.Episode(columns, videos(*(f"images.rgb.{c}" for c in ("head", "hand_left", "hand_right"))), fps=30)


def interndata_m1_franka(calibration: Path) -> datasets.Episode:
    still = {"K": K3, "world_from_cam": np.eye(4).tolist()}
    content = {"base_view": still, "base_view_2": still, "ego_view": {"K": K3, "ee_from_cam": np.eye(4).tolist()}}
    (calibration / "episode_000000.json").write_text(json.dumps(content))
    columns = {
        "observation.state.ee_pos": rows(0.4, 0, 0.3),
        "observation.state.ee_rot": np.tile(np.float32(WXYZ), (T, 1)),
        "observation.state.gripper": np.full((T, 2), 0.04, np.float32),
    }
    return datasets.Episode(columns, videos(*(f"observation.images.{v}_view" for v in ("base", "base_2", "ego"))))


def agibotworld_alpha(calibration: Path) -> datasets.Episode:
    folder = calibration / "episode_000000"
    folder.mkdir()
    pose = {"extrinsic": {"rotation_matrix": np.eye(3).tolist(), "translation_vector": [0.1, 0.0, 1.2]}}
    for camera in ("head", "hand_left", "hand_right"):
        (folder / f"{camera}_extrinsic_params_aligned.json").write_text(json.dumps([pose] * (T + 1)))
        intrinsic = {"intrinsic": {"fx": 300.0, "fy": 301.0, "ppx": 32.0, "ppy": 24.0}}
        (folder / f"{camera}_intrinsic_params.json").write_text(json.dumps(intrinsic))
    columns = {
        "observation.state.end.position": np.concatenate([rows(0.5, 0.2, 0.9), rows(0.5, -0.2, 0.9)], axis=1),
        "observation.state.end.orientation": np.tile(np.float32([0, 0, 0, 1, 0, 0, 0, 1]), (T, 1)),
        "observation.state.effector.position": np.tile(np.float32([35.0, 120.0]), (T, 1)),
        "action_text": ["reach"] * 6 + ["grasp"] * 6,
    }
    keys = ("observation.images.top_head", "observation.images.hand_left", "observation.images.hand_right")
    return datasets.Episode(columns, videos(*keys), fps=30)


# Preset -> dataset class, how its columns are made, openness of each arm at the first frame, frames of the episode.
CASES = {
    "droid": ("Droid", droid, [1.0], 12),
    "interndata_a1_franka": ("InternA1Franka", interndata_a1_franka, [0.5], 4),
    "interndata_a1_lift2": ("InternA1Lift2", interndata_a1_two_arms, [0.0, 0.0], 4),
    "interndata_a1_genie1": ("InternA1Genie1", interndata_a1_two_arms, [0.0, 0.0], 4),
    "interndata_a1_split_aloha": ("InternA1SplitAloha", interndata_a1_two_arms, [0.0, 0.0], 4),
    "interndata_m1_franka": ("InternM1Franka", interndata_m1_franka, [1.0], 12),
    "agibotworld_alpha": ("AgibotWorldAlpha", agibotworld_alpha, [0.0, 1.0, 0.0], 12),
}


@pytest.mark.parametrize("preset", CASES)
def test_a_preset_gives_episodes_that_its_class_reads(preset, tmp_path):
    class_name, make, openness, frames = CASES[preset]
    calibration = tmp_path / "calibration"
    calibration.mkdir()
    source = datasets.write_v30(tmp_path / "src", [make(calibration)])
    converter = LerobotConverter(LerobotSettings(source, preset, calibration))
    path = tmp_path / "episode.h5"
    write_episode(path, converter.convert(converter.jobs()[0]))
    with Episode(path) as episode:
        assert len(episode) == frames
        np.testing.assert_allclose(episode.gripper[0], openness, atol=1e-6)
        step = DATASETS[class_name].config.record_dt or 0.1
        np.testing.assert_allclose(np.diff(episode.timestamps), step, rtol=1e-4)
    dataset = DATASETS[class_name]([path])
    sample = dataset.sample(0, np.random.default_rng(0), frame=1)
    assert (
        sample.rgb.shape[1] == dataset.config.num_cameras
        and sample.mask.any(axis=(2, 3, 4)[: sample.mask.ndim - 2]).all()
    )
    assert np.isfinite(sample.future).all() and sample.valid_ee.sum() == len(dataset.config.ee_indices)


def test_droid_intrinsics_follow_the_size_of_its_videos(tmp_path):
    source = datasets.write_v30(tmp_path / "src", [droid(tmp_path)])
    converter = LerobotConverter(LerobotSettings(source, "droid", tmp_path))
    episode = converter.convert(converter.jobs()[0])
    np.testing.assert_allclose(episode.cameras["exterior_1_left"].K, [[26, 0, 32], [0, 520 * 48 / 720, 24], [0, 0, 1]])
    # Carried by the arm: it stands still in the hand while the hand moves.
    ee_from_cam = np.linalg.inv(episode.world_from_ee[:, 0]) @ episode.cameras["wrist_left"].world_from_cam
    np.testing.assert_allclose(ee_from_cam, np.broadcast_to(ee_from_cam[0], ee_from_cam.shape), atol=1e-6)
    assert episode.prompts == ["put the cup on the plate", "cup on plate"]


def test_every_shipped_mapping_is_tested():
    assert {path.stem for path in PRESETS.glob("*.yaml")} - set(CASES) <= {"apt_export"}


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ("axes: xyz", "arms[0].pose: form xyz+euler takes angles, axes, not angles"),
        ("closed: 1.0", "arms[0].gripper: lacks field 'closed'"),
        ("rate: 15", None),
    ],
)
def test_a_wrong_mapping_is_answered_with_file_and_field(change, complaint, tmp_path):
    text = (PRESETS / "droid.yaml").read_text()
    at = text.index("arms:") if complaint else 0
    path = tmp_path / "mine.yaml"
    path.write_text(text[:at] + text[at:].replace(change + ", ", "", 1).replace(change + "\n", "rat: 15\n", 1))
    with pytest.raises(MappingError) as error:
        load_mapping(path)
    assert str(error.value).startswith(f"{path}, line ") and "\n" not in str(error.value)
    assert (complaint or "has unknown field 'rat'") in str(error.value)
