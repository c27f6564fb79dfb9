"""LeRobot datasets become episodes: the same from both layouts, whole or named as faulty."""

from __future__ import annotations

import copy
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

from data_utils.convert.__main__ import main
from data_utils.convert.lerobot import LerobotConverter, LerobotSettings
from data_utils.convert.runner import Skipped, run
from data_utils.errors import DataError
from data_utils.h5io import Episode, EpisodeData, write_episode
from data_utils.video.index import read_index
from data_utils.video.readers import READER_TYPES
from tests.conftest import VIDEOS
from tests.convert import datasets

MAPPING = {
    "timestamp": "timestamp",
    "prompts": [{"task": True}, {"column": "paraphrase"}],
    "subtasks": "subtask",
    "arms": [
        {
            "name": "arm",
            "pose": {"form": "xyz+quat", "order": "xyzw", "values": "state[0:7]"},
            "gripper": {"values": "state[7]", "closed": 0.8, "open": 0.2},
        }
    ],
    "cameras": {
        "front": {
            "frames": "images.front",
            "K": {"form": "fx+fy+cx+cy", "values": [40, 40, 32, 24]},
            "axes": "opencv",
            "world_from_cam": {"form": "xyz+rotvec", "values": [0, 0, 1, 3.14159, 0, 0]},
        },
        "hand": {
            "frames": "images.hand",
            "K": {"form": "fx+fy+cx+cy", "values": [80, 80, 64, 48], "size": [128, 96]},
            "axes": "opengl",
            "on_arm": "arm",
            "ee_from_cam": {"form": "xyz+rotvec", "values": [0, 0, -0.1, 0, 0, 0]},
        },
    },
}


def content(count: int = 3, hand_is_image: bool = False) -> list[datasets.Episode]:
    made = []
    for index in range(count):
        rng, T = np.random.default_rng(index), 6 + index
        quaternion = rng.normal(size=(T, 4))
        quaternion /= np.linalg.norm(quaternion, axis=1, keepdims=True)
        state = np.concatenate([0.1 * rng.normal(size=(T, 3)), quaternion, rng.uniform(0.1, 0.9, (T, 1))], axis=1)
        columns = {
            "state": state.astype(np.float32),
            "paraphrase": [f"shove it, {index}"] * T,
            "subtask": ["reach"] * 3 + ["push"] * (T - 3),
        }
        hand = {"images.hand": datasets.frames(T, seed=100 + index)}
        videos = {"images.front": datasets.frames(T, seed=index)} | ({} if hand_is_image else hand)
        task = f"push cup {index % 2}"
        made.append(datasets.Episode(columns, videos, hand if hand_is_image else {}, task))
    return made


def mapping_file(tmp_path: Path, **changes) -> Path:
    path = tmp_path / "mapping.yaml"
    path.write_text(yaml.safe_dump(MAPPING | changes))
    return path


def convert(src: Path, out: Path, mapping: Path, **settings):
    converter = LerobotConverter(LerobotSettings(src, str(mapping), **settings))
    return run(converter, out, 1, {}, converter.copy_videos)


def converted_episode(src: Path, mapping: Path, index: int) -> EpisodeData:
    converter = LerobotConverter(LerobotSettings(src, str(mapping)))
    return converter.convert(converter.jobs()[index])


def arrays(path: Path) -> dict[str, np.ndarray]:
    with Episode(path) as episode:
        out = {"ee": episode.world_from_ee, "gripper": episode.gripper, "time": episode.timestamps}
        for camera in episode.cameras:
            for t in range(len(episode)):
                out[f"{camera} {t}"] = episode.rgb(camera, t)
                out[f"{camera} pose {t}"] = episode.world_from_cam(camera, t)
                out[f"{camera} K {t}"] = episode.K(camera, t)
        out["texts"] = np.array([*episode.prompts, *(text for _, text in episode.subtasks)])
        return out


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, Path]:
    """The same three episodes in both layouts."""
    folder = tmp_path_factory.mktemp("lerobot")
    return {
        "v2.1": datasets.write_v21(folder / "v21", content()),
        "v3.0": datasets.write_v30(folder / "v30", content()),
    }


@pytest.fixture(scope="module")
def converted(sources, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("converted")
    for version, source in sources.items():
        summary = convert(source, folder / version, mapping_file(folder))
        assert (summary.converted, summary.failed, summary.skipped) == (3, [], {})
    return {version: folder / version for version in sources}


def test_both_layouts_give_the_same_episodes(converted):
    for index, episode in enumerate(content()):
        one, other = (arrays(converted[version] / f"chunk-000/episode_{index:06d}.h5") for version in converted)
        assert one.keys() == other.keys() and len(one["time"]) == episode.length
        for key, value in one.items():
            near = key.startswith(("front ", "hand ")) and value.ndim == 3  # encoded twice
            equal = np.abs(value.astype(int) - other[key]).max() <= 3 if near else (value == other[key]).all()
            assert equal, key


def test_episodes_hold_what_was_recorded(converted):
    episode = content()[1]
    with Episode(converted["v3.0"] / "chunk-000/episode_000001.h5") as read:
        state = episode.columns["state"]
        np.testing.assert_array_equal(read.world_from_ee[:, 0, :3, 3], state[:, :3])
        np.testing.assert_allclose(read.gripper[:, 0], ((0.8 - state[:, 7]) / 0.6).clip(0, 1), atol=1e-6)
        assert read.prompts == ["push cup 1", "shove it, 1"]
        assert read.subtasks == [(0, "reach"), (3, "push")]
        np.testing.assert_allclose(read.timestamps, np.arange(7) / 10, atol=1e-6)
        for t in range(7):  # 9 frames of episode 0 come before it in the same video
            for name, key in (("front", "images.front"), ("hand", "images.hand")):
                assert np.abs(read.rgb(name, t).astype(int) - episode.videos[key][t]).max() <= 3
        np.testing.assert_allclose(read.K("hand", 0), [[40, 0, 32], [0, 40, 24], [0, 0, 1]])
        # An OpenGL camera looks along -z; ours look along +z.
        np.testing.assert_allclose(
            read.world_from_cam("hand", 2)[:3, :3], read.world_from_ee[2, 0, :3, :3] @ np.diag([1, -1, -1]), atol=1e-6
        )
        assert read.attributes["source_episode"] == 1


def test_copied_videos_stand_alone(sources, tmp_path):
    source = shutil.copytree(sources["v3.0"], tmp_path / "source")
    convert(source, tmp_path / "out", mapping_file(tmp_path), videos="copy")
    shutil.rmtree(source)
    assert (tmp_path / "out/videos/images.front/chunk-000/file-000.mp4").is_file()
    moved = (tmp_path / "out").rename(tmp_path / "moved")
    with Episode(moved / "chunk-000/episode_000002.h5") as episode:
        assert np.abs(episode.rgb("front", 7).astype(int) - content()[2].videos["images.front"][7]).max() <= 3


def test_a_copied_video_of_another_dataset_is_replaced(sources, tmp_path):
    out, name = tmp_path / "out", "videos/chunk-000/images.front/episode_000000.mp4"
    video = sources["v2.1"] / name
    (out / name).parent.mkdir(parents=True)
    (out / name).write_bytes(bytes(video.stat().st_size))
    os.utime(out / name, (0, 0))
    convert(sources["v2.1"], out, mapping_file(tmp_path), videos="copy")
    assert (out / name).read_bytes() == video.read_bytes()


def test_videos_that_decord_refuses_are_in_the_summary_also_when_all_is_there(tmp_path):
    source = datasets.write_v21(tmp_path / "src", content(1))
    video = source / "videos/chunk-000/images.front/episode_000000.mp4"
    shutil.copyfile(VIDEOS / "av1_front.mp4", video)  # the same pictures
    with pytest.raises(DataError, match="are AV1"):
        READER_TYPES["decord"].check(read_index(video))
    for _ in range(2):
        summary = convert(source, tmp_path / "out", mapping_file(tmp_path))
        assert "\n  videos are AV1: train with --video_reader pyav" in summary.text()


def test_a_missing_calibration_file_of_all_episodes_is_named_before_anything_is_converted(sources, tmp_path, capsys):
    cameras = copy.deepcopy(MAPPING["cameras"])
    cameras["hand"]["K"]["values"] = {"file": "wrist.json", "key": "K"}
    command = ["lerobot", "--src", str(sources["v2.1"]), "--out", str(tmp_path / "out"), "--calibration", str(tmp_path)]
    command += ["--mapping", str(mapping_file(tmp_path, cameras=cameras))]
    assert main(command) == 2
    said = capsys.readouterr().err
    assert f"cameras.hand.K.values wants the calibration file {tmp_path}/wrist.json" in said and said.count("\n") == 1
    assert not (tmp_path / "out").exists()
    cameras["hand"]["K"]["values"]["file"] = "wrist_{episode_index}.json"  # those of episodes fail one by one
    mapping_file(tmp_path, cameras=cameras)
    assert main(command) == 1
    said = capsys.readouterr().out
    assert "failed 3: file; the first, chunk-000/episode_00000" in said and "no such calibration file" in said


def test_image_columns_are_read_as_they_are(tmp_path):
    source = datasets.write_v21(tmp_path / "src", content(1, hand_is_image=True))
    write_episode(tmp_path / "episode.h5", converted_episode(source, mapping_file(tmp_path), 0))
    with Episode(tmp_path / "episode.h5") as episode:
        assert np.abs(episode.rgb("hand", 3).astype(int) - content(1)[0].videos["images.hand"][3]).max() <= 3


def test_damaged_files_are_reported_and_the_rest_is_converted(sources, tmp_path):
    source = shutil.copytree(sources["v2.1"], tmp_path / "src")
    episodes = content(3) + content(2)
    shutil.rmtree(source)
    datasets.write_v21(source, episodes)
    parquet = source / "data/chunk-000/episode_000000.parquet"
    parquet.write_bytes(parquet.read_bytes()[:-200])
    (source / "videos/chunk-000/images.front/episode_000001.mp4").unlink()
    datasets.write_video(source / "videos/chunk-000/images.hand/episode_000002.mp4", datasets.frames(4))
    video = source / "videos/chunk-000/images.front/episode_000003.mp4"
    video.write_bytes(video.read_bytes()[:-300])
    summary = convert(source, tmp_path / "out", mapping_file(tmp_path))
    assert summary.converted == 1
    failures = {failure.episode[-1]: failure for failure in summary.failed}
    assert {name: failure.rule for name, failure in failures.items()} == {
        "0": "file",
        "1": "video",
        "2": "video",
        "3": "video",
    }
    assert "episode_000000.parquet" in failures["0"].message
    assert "row 7, at 0.7000 s, is 0.4000 s from the nearest frame" in failures["2"].message


def test_episodes_that_the_mapping_leaves_out_are_skipped(tmp_path):
    source = datasets.write_v21(tmp_path / "src", content(2))
    mapping = mapping_file(tmp_path, keep=[{"column": "paraphrase", "equals": "shove it, 1"}])
    with pytest.raises(Skipped, match="paraphrase is not 'shove it, 1'"):
        converted_episode(source, mapping, 0)
    assert converted_episode(source, mapping, 1).prompts[1] == "shove it, 1"


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"subtasks": "annotation.subtask"}, "subtasks wants column 'annotation.subtask'"),
        (
            {"arms": [{"name": "arm", "pose": {"form": "matrix", "values": ["pose[0:16]"]}}]},
            "arms[0].pose.values wants column 'pose'",
        ),
    ],
)
def test_a_column_that_is_not_there_is_named_beside_those_that_are(change, field, sources, tmp_path, capsys):
    mapping = mapping_file(tmp_path, **change)
    assert (
        main(["lerobot", "--src", str(sources["v2.1"]), "--mapping", str(mapping), "--out", str(tmp_path / "o")]) == 2
    )
    said = capsys.readouterr().err
    assert field in said and "it has state, paraphrase, subtask, images.front" in said and said.count("\n") == 1
    assert not (tmp_path / "o").exists()


def test_an_episode_without_a_column_of_the_others_fails_by_name(sources, tmp_path):
    source = shutil.copytree(sources["v2.1"], tmp_path / "src")
    path = source / "data/chunk-000/episode_000001.parquet"
    pq.write_table(pq.read_table(path).drop_columns(["state"]), path)
    with pytest.raises(DataError, match="no column 'state', which .*mapping.yaml wants for"):
        converted_episode(source, mapping_file(tmp_path), 1)
    converted_episode(source, mapping_file(tmp_path), 2)


def test_other_versions_are_refused_in_one_line(tmp_path, capsys):
    source = datasets.write_v21(tmp_path / "src", content(1))
    info = source / "meta/info.json"
    info.write_text(info.read_text().replace("v2.1", "v1.6"))
    mapping = mapping_file(tmp_path)
    assert main(["lerobot", "--src", str(source), "--mapping", str(mapping), "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert "codebase_version is v1.6; this reads v2.0, v2.1, v3.0" in said and said.count("\n") == 1


@pytest.mark.parametrize("version", ["v2.1", "v3.0"])
def test_a_table_of_episodes_that_lacks_something_is_named(version, sources, tmp_path):
    source = shutil.copytree(sources[version], tmp_path / "src")
    if version == "v2.1":
        path = source / "meta/episodes.jsonl"
        path.write_text(path.read_text().replace("length", "size"))
    else:
        path = source / "meta/episodes/chunk-000/file-000.parquet"
        pq.write_table(pq.read_table(path).drop_columns(["data/file_index"]), path)
    with pytest.raises(DataError, match="the table of episodes lacks '(length|data/file_index)'"):
        LerobotConverter(LerobotSettings(source, str(mapping_file(tmp_path)))).jobs()


@pytest.mark.slow
def test_a_conversion_that_is_killed_again_and_again_ends_like_one_that_is_not(tmp_path):
    source = datasets.write_v30(tmp_path / "src", content(16), per_file=4)
    command = [sys.executable, "-m", "data_utils.convert", "lerobot", "--src", str(source), "--workers", "2"]
    command += ["--mapping", str(mapping_file(tmp_path)), "--videos", "copy", "--out"]
    cwd = Path(__file__).parents[2]
    subprocess.run([*command, str(tmp_path / "whole")], cwd=cwd, check=True)
    out, kills = tmp_path / "out", 0
    while len(list(out.rglob("*.h5"))) < 16:
        before = len(list(out.rglob("*.h5")))
        process = subprocess.Popen([*command, str(out)], cwd=cwd)
        while process.poll() is None and len(list(out.rglob("*.h5"))) < before + 3:
            time.sleep(0.002)
        process.kill()
        process.wait()
        kills += 1
        for path in out.rglob("*.h5"):
            arrays(path)  # whole
    subprocess.run([*command, str(out)], cwd=cwd, check=True)
    assert kills > 2
    for path in (tmp_path / "whole").rglob("*.h5"):
        one, other = arrays(path), arrays(out / path.relative_to(tmp_path / "whole"))
        assert all((one[key] == other[key]).all() for key in one)
    assert not list(out.rglob(".*.tmp"))


def test_another_mapping_of_the_same_name_is_another_setting(sources, tmp_path, capsys):
    command = ["lerobot", "--src", str(sources["v2.1"]), "--out", str(tmp_path / "out"), "--workers", "1"]
    command += ["--mapping", str(mapping_file(tmp_path))]
    assert main(command) == 0
    assert main(command) == 0
    mapping_file(tmp_path, time_step=0.1, timestamp=None)
    assert main(command) == 2
    assert "(mapping.time_step: null -> 0.1; mapping.timestamp: timestamp -> null)" in capsys.readouterr().err


def test_a_converter_without_its_table_of_tasks_fails_by_name(sources, tmp_path):
    source = shutil.copytree(sources["v2.1"], tmp_path / "src")
    (source / "meta/tasks.jsonl").write_text("")
    converter = LerobotConverter(LerobotSettings(source, str(mapping_file(tmp_path))))
    with pytest.raises(DataError, match="task 0 is not in the dataset's table of tasks"):
        converter.convert(converter.jobs()[0])
