"""Episodes that are exported to LeRobot and converted back are the same episodes."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from scipy.spatial.transform import Rotation

from data_utils.convert.__main__ import main as convert
from data_utils.export.__main__ import main as export
from data_utils.h5io import CameraData, Episode, EpisodeData, VideoFrames, write_episode
from data_utils.video import open_video
from tests.convert import datasets

SIZES = {"front": (48, 64), "hand": (37, 51)}  # odd sizes have their own pixel format


def poses(rng: np.random.Generator, *shape: int) -> np.ndarray:
    out = np.tile(np.eye(4), (*shape, 1, 1))
    out[..., :3, :3] = (
        Rotation.random(int(np.prod(shape)), random_state=rng.integers(2**31)).as_matrix().reshape(*shape, 3, 3)
    )
    out[..., :3, 3] = 0.05 * rng.normal(size=(*shape, 3))
    return out


def episode(seed: int, desired: bool = True) -> EpisodeData:
    rng, T = np.random.default_rng(seed), 8 + seed
    cameras = {
        "front": CameraData(poses(rng, 1)[0], np.array([[50.0, 0, 32], [0, 51, 24], [0, 0, 1]]), []),
        "hand": CameraData(poses(rng, T), np.array([[40.0, 0, 25.5], [0, 41, 18.5], [0, 0, 1]]), []),
    }
    for number, (name, size) in enumerate(SIZES.items()):
        cameras[name].frames = list(datasets.frames(T, 10 * seed + number, size))
    commanded = {"world_from_ee_desired": poses(rng, T, 2), "gripper_desired": rng.uniform(0, 1, (T, 2))}
    return EpisodeData(
        timestamp=np.cumsum(rng.uniform(0.049, 0.051, T)),
        world_from_ee=poses(rng, T, 2),
        gripper=rng.uniform(0, 1, (T, 2)),
        prompts=["stack the cups", f"put one cup on the other, {seed}"],
        cameras=cameras,
        subtasks=[(2, "reach"), (5, "grasp")],
        ee_indices=[1, 0],
        **(commanded if desired else {}),
    )


@pytest.fixture(scope="module")
def there_and_back(tmp_path_factory) -> tuple[Path, Path, Path]:
    """Folders of the original episodes, the LeRobot dataset and the episodes made from it."""
    folder = tmp_path_factory.mktemp("export")
    (folder / "src").mkdir()
    for seed in range(3):
        write_episode(folder / f"src/episode_{seed}.h5", episode(seed), jpeg_quality=100)
    arguments = ["--src", str(folder / "src"), "--out", str(folder / "lerobot"), "--workers", "2"]
    assert export(arguments) == 0
    back = ["lerobot", "--src", str(folder / "lerobot"), "--out", str(folder / "back"), "--workers", "2"]
    assert convert(back) == 0
    return folder / "src", folder / "lerobot", folder / "back"


def test_everything_but_the_pixels_comes_back_bit_for_bit(there_and_back):
    source, _, back = there_and_back
    for seed in range(3):
        with (
            Episode(source / f"episode_{seed}.h5") as one,
            Episode(back / f"chunk-000/episode_{seed:06d}.h5") as other,
        ):
            assert other.cameras == one.cameras
            for name in ("timestamps", "world_from_ee", "gripper", "world_from_ee_desired", "gripper_desired"):
                np.testing.assert_array_equal(getattr(other, name), getattr(one, name), err_msg=name)
            assert (other.prompts, other.subtasks) == (one.prompts, one.subtasks)
            assert other.ee_indices == one.ee_indices == (1, 0)
            for camera in one.cameras:
                for t in range(len(one)):
                    np.testing.assert_array_equal(other.world_from_cam(camera, t), one.world_from_cam(camera, t))
                    np.testing.assert_array_equal(other.K(camera, t), one.K(camera, t))
                    difference = np.abs(other.rgb(camera, t).astype(int) - one.rgb(camera, t))
                    assert difference.shape[:2] == SIZES[camera] and difference.max() <= 6


def test_the_dataset_is_what_lerobot_reads(there_and_back):
    _, dataset, _ = there_and_back
    info = json.loads((dataset / "meta/info.json").read_text())
    assert (info["codebase_version"], info["fps"], info["total_frames"]) == ("v3.0", 20, 8 + 9 + 10)
    assert info["features"]["observation.state"]["names"][:2] == ["arm_0.x", "arm_0.y"]
    for index, first in enumerate((0, 8, 17)):
        table = pq.read_table(dataset / f"data/chunk-000/file-{index:03d}.parquet")
        stored = {name for name, feature in info["features"].items() if feature["dtype"] != "video"}
        assert set(table.column_names) == stored
        assert table["index"].to_pylist() == list(range(first, first + 8 + index))
        np.testing.assert_allclose(table["timestamp"].to_numpy(), np.arange(8 + index) / 20, rtol=1e-6)
        video = open_video(dataset / f"videos/observation.images.front/chunk-000/file-{index:03d}.mp4", "pyav")
        np.testing.assert_allclose(video.times, np.arange(8 + index) / 20, atol=1e-6)
    state = np.stack(pq.read_table(dataset / "data/chunk-000/file-000.parquet")["observation.state"].to_numpy())
    assert (np.sum(state[1:, 3:7] * state[:-1, 3:7], axis=1) >= 0).all()  # quaternions do not jump
    stats = json.loads((dataset / "meta/stats.json").read_text())
    assert set(stats) == set(info["features"]) - {"apt.subtask"}
    assert set(stats["action"]) == {"min", "max", "mean", "std", "count", "q01", "q10", "q50", "q90", "q99"}
    assert np.shape(stats["observation.images.hand"]["mean"]) == (3, 1, 1)
    every = np.concatenate([np.stack(pq.read_table(p)["action"].to_numpy()) for p in sorted(dataset.glob("data/*/*"))])
    np.testing.assert_allclose(stats["action"]["mean"], every.mean(0), atol=1e-6)
    np.testing.assert_allclose(stats["action"]["std"], every.std(0), atol=1e-6)


def test_videos_and_episodes_without_commands_are_exported_too(tmp_path):
    (tmp_path / "src").mkdir()
    data = episode(0, desired=False)
    datasets.write_video(tmp_path / "src/front.mp4", np.stack(data.cameras["front"].frames))
    data.cameras["front"].frames = VideoFrames("front.mp4", np.arange(8) / 10)
    write_episode(tmp_path / "src/one.h5", data)
    command = ["--src", str(tmp_path / "src"), "--out", str(tmp_path / "out"), "--workers", "1", "--fps", "20"]
    assert export(command) == 0
    table = pq.read_table(tmp_path / "out/data/chunk-000/file-000.parquet")
    state, action = (np.stack(table[name].to_numpy()) for name in ("observation.state", "action"))
    np.testing.assert_array_equal(action[:-1], state[1:])
    assert "apt.ee_pose_desired.0" not in table.column_names


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ("none", "holds no episode files"),
        ("kinds", "has_desired is True, False in"),
        ("sizes", "front/rgb at frame 0 is (32, 32), in the first episode (48, 64)"),
        ("exists", "is there already"),
        ("rate", "no whole number; give --fps"),
        ("damaged", "not a readable HDF5 file"),
    ],
)
def test_what_cannot_be_exported_is_answered_in_one_line_and_leaves_nothing(change, complaint, tmp_path, capsys):
    source, out = tmp_path / "src", tmp_path / "out"
    source.mkdir()
    if change != "none":
        data = episode(0, desired=False)
        data.timestamp = data.timestamp * (26 if change == "rate" else 1)
        write_episode(source / "a.h5", data)
    if change == "kinds":
        write_episode(source / "b.h5", episode(1))
    if change == "sizes":
        data.cameras["front"].frames = list(datasets.frames(8, size=(32, 32)))
        write_episode(source / "b.h5", data)
    if change == "damaged":
        (source / "b.h5").write_bytes(b"nothing")
    if change == "exists":
        out.mkdir()
    assert export(["--src", str(source), "--out", str(out), "--workers", "1"]) == 2
    said = capsys.readouterr().err
    assert complaint in said and said.splitlines()[-1].startswith("python -m data_utils.export: ")
    assert sorted(path.name for path in tmp_path.iterdir()) == (["out", "src"] if change == "exists" else ["src"])


def test_ctrl_c_leaves_no_half_of_a_dataset(tmp_path):
    (tmp_path / "src").mkdir()
    for seed in range(20):
        write_episode(tmp_path / f"src/{seed}.h5", episode(0))
    command = [
        sys.executable,
        "-m",
        "data_utils.export",
        "--src",
        str(tmp_path / "src"),
        "--out",
        str(tmp_path / "out"),
    ]
    process = subprocess.Popen(command, cwd=Path(__file__).parents[2], stderr=subprocess.PIPE, text=True)
    while not list(tmp_path.rglob("*.mp4")):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=30)[1]
    assert process.returncode == 130 and said.strip().endswith("interrupted; nothing was written")
    assert [path.name for path in tmp_path.iterdir()] == ["src"]
