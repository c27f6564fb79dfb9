"""Recordings in other units than their mapping says, and sources that change between two conversions."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest

from data_utils.checks.unusual import find_warnings
from data_utils.convert.robomimic import RobomimicConverter, RobomimicSettings
from data_utils.convert.runner import run
from data_utils.h5io import Episode
from data_utils.video import VideoCache
from tests.convert import datasets
from tests.convert.test_lerobot_conversion import MAPPING, content, convert, mapping_file
from tests.convert.test_robomimic_conversion import mapping_file as robomimic_mapping
from tests.convert.test_robomimic_conversion import source as robomimic_source  # noqa: F401


def with_state(change) -> list[datasets.Episode]:
    """Episodes whose states (T, 8) are changed in place."""
    episodes = content()
    for episode in episodes:
        change(episode.columns["state"])
    return episodes


def scaled(columns: slice, factor: float):
    def change(state: np.ndarray) -> None:
        state[:, columns] *= factor

    return change


@pytest.mark.parametrize(("change", "pose", "rule", "said"), [
    (scaled(slice(7, 8), 1000), {}, "gripper", "far outside 0.8 (closed) to 0.2 (open); is it in another unit"),
    (scaled(slice(0, 3), 1000), {}, "pose", "m/s in the median; are its positions in millimetres"),
    (scaled(slice(3, 6), 180), {"form": "xyz+rotvec", "values": "state[0:6]"}, "rotation", "are its angles in degrees"),
    (
        scaled(slice(3, 6), 180),
        {"form": "xyz+euler", "axes": "xyz", "angles": "radians", "values": "state[0:6]"}, "rotation",
        "by more than a full turn; are its angles in degrees",
    ),
])  # fmt: skip
def test_another_unit_is_refused_with_the_number_that_gives_it_away(change, pose, rule, said, tmp_path):
    arms = [{**MAPPING["arms"][0], **({"pose": pose} if pose else {})}]
    source = datasets.write_v21(tmp_path / "in", with_state(change))
    summary = convert(source, tmp_path / "out", mapping_file(tmp_path, arms=arms))
    assert summary.converted == 0 and {failure.rule for failure in summary.failed} == {rule}
    assert all(said in failure.message for failure in summary.failed), summary.failed[0].message


def test_a_few_readings_outside_a_grippers_range_are_cut_off_and_remarked_on(tmp_path):
    def change(state: np.ndarray) -> None:
        state[:, 7] = 0.5

    episodes = with_state(change)
    long = episodes[2]
    for key, value in long.columns.items():
        long.columns[key] = np.tile(value, (2, 1)) if isinstance(value, np.ndarray) else list(value) * 2
    long.columns["subtask"] = sorted(long.columns["subtask"], reverse=True)
    for frames in (long.videos, long.images):
        for key in frames:
            frames[key] = np.concatenate([frames[key]] * 2)
    long.columns["state"][4, 7] = 3.0
    summary = convert(datasets.write_v21(tmp_path / "in", episodes), tmp_path / "out", mapping_file(tmp_path))
    assert summary.converted == 3, summary.text()
    path = tmp_path / "out/chunk-000/episode_000002.h5"
    with Episode(path) as episode:
        assert episode.gripper[4, 0] == 0.0 and episode.gripper[3, 0] == pytest.approx(0.5)
    remarks = [warning.message for warning in find_warnings(path, VideoCache("pyav")) if warning.rule == "gripper"]
    said = "arms[0].gripper reads 0.5 to 3, 6% of it far outside 0.8 (closed) to 0.2 (open); it was cut off there"
    assert remarks == [said]


# -- changed sources ---------------------------------------------------------------------------------------------------


def first_positions(out: Path) -> list[float]:
    found = []
    for path in sorted(out.rglob("episode_*.h5")):
        with Episode(path) as episode:
            found.append(float(episode.world_from_ee[0, 0, 0, 3]))
    return found


def images_are_of(out: Path, episodes: list[datasets.Episode]) -> bool:
    for path, episode in zip(sorted(out.rglob("episode_*.h5")), episodes, strict=True):
        with Episode(path, videos=VideoCache("pyav")) as read:
            for t in range(len(read)):
                if np.abs(read.rgb("front", t).astype(int) - episode.videos["images.front"][t]).max() > 3:
                    return False
    return True


@pytest.mark.parametrize("videos", ["reference", "copy"])
@pytest.mark.parametrize("write", [datasets.write_v21, datasets.write_v30])
def test_an_episode_that_was_recorded_again_is_converted_again(write, videos, tmp_path):
    first, second = content(3), content(3)
    again = content(5)[4]  # of another length, and other images
    second[1] = again
    write(tmp_path / "first", first), write(tmp_path / "second", [*second, content(4)[3]])
    shutil.copytree(tmp_path / "first", tmp_path / "in")
    mapping, out = mapping_file(tmp_path), tmp_path / "out"
    assert convert(tmp_path / "in", out, mapping, videos=videos).converted == 3
    summary = convert(tmp_path / "in", out, mapping, videos=videos)
    assert (summary.converted, summary.already_there, summary.changed) == (0, 3, 0)
    shutil.rmtree(tmp_path / "in")
    shutil.copytree(tmp_path / "second", tmp_path / "in")
    for path in (tmp_path / "in").rglob("*"):  # as files of a later time
        if path.is_file():
            os.utime(path, ns=(path.stat().st_mtime_ns + 10**10,) * 2)
    summary = convert(tmp_path / "in", out, mapping, videos=videos)
    assert summary.failed == [] and summary.changed == 3 and "source has changed: 3, converted anew" in summary.text()
    episodes = [*second, content(4)[3]]
    assert first_positions(out) == pytest.approx([float(e.columns["state"][0, 0]) for e in episodes])
    assert images_are_of(out, episodes)


def test_new_episodes_leave_the_old_ones_alone(tmp_path):
    episodes = content(4)
    datasets.write_v21(tmp_path / "in", episodes[:3])
    mapping, out = mapping_file(tmp_path), tmp_path / "out"
    convert(tmp_path / "in", out, mapping)
    datasets.write_v21(tmp_path / "more", episodes)
    for path in (tmp_path / "more").rglob("*"):  # what was there keeps its times; tables and the new one are new
        there = tmp_path / "in" / path.relative_to(tmp_path / "more")
        if path.is_file() and (path.parts[-3:][0] == "meta" or path.parent.name == "meta" or not there.exists()):
            there.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, there)
    summary = convert(tmp_path / "in", out, mapping)
    assert (summary.converted, summary.already_there, summary.changed) == (1, 3, 0)


def test_another_text_of_its_task_makes_an_episode_anew(tmp_path):
    source = datasets.write_v21(tmp_path / "in", content(3))
    mapping, out = mapping_file(tmp_path), tmp_path / "out"
    convert(source, out, mapping)
    table = source / "meta/tasks.jsonl"
    table.write_text(table.read_text().replace("push cup 1", "lift cup 1"))
    summary = convert(source, out, mapping)
    assert summary.changed == 1
    with Episode(out / "chunk-000/episode_000001.h5") as episode:
        assert episode.prompts[0] == "lift cup 1"


def test_an_episode_whose_record_was_lost_is_made_anew_and_a_folder_without_one_is_left(tmp_path):
    source = datasets.write_v21(tmp_path / "in", content(3))
    mapping, out = mapping_file(tmp_path), tmp_path / "out"
    convert(source, out, mapping)
    record = out / "sources.jsonl"
    lines = record.read_text().splitlines()
    assert {json.loads(line)["episode"] for line in lines} == {f"chunk-000/episode_{i:06d}" for i in range(3)}
    record.write_text("\n".join(lines[:2]) + '\n{"episode": "chunk-0')  # the end of a run that was killed
    assert convert(source, out, mapping).changed == 1
    record.unlink()
    assert convert(source, out, mapping).already_there == 3


# -- robomimic's names and lengths -------------------------------------------------------------------------------------


def convert_robomimic(src: Path, tmp_path: Path):
    converter = RobomimicConverter(RobomimicSettings(src, robomimic_mapping(tmp_path)))
    return run(converter, tmp_path / "out", 1, {})


def test_demonstrations_of_one_number_and_files_of_one_stem_get_a_file_each(robomimic_source, tmp_path):  # noqa: F811
    folder = tmp_path / "several"
    folder.mkdir()
    with h5py.File(robomimic_source, "r+") as file:
        file.move("data/demo_1", "data/demo_2b")
    shutil.copy(robomimic_source, folder / "lift.hdf5")
    shutil.copy(robomimic_source, folder / "lift.h5")
    summary = convert_robomimic(folder, tmp_path)
    assert summary.converted == 6, summary.text()
    names = sorted(str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*.h5"))
    assert names == [f"lift_{end}/{name}.h5" for end in ("h5", "hdf5") for name in ("demo_000000", "demo_2", "demo_2b")]


def test_a_length_that_disagrees_is_named_with_the_other(robomimic_source, tmp_path):  # noqa: F811
    with h5py.File(robomimic_source, "r+") as file:
        poses = file["data/demo_1/obs/robot0_eef_pos"][:3]
        del file["data/demo_1/obs/robot0_eef_pos"]
        file["data/demo_1/obs/robot0_eef_pos"] = poses
    summary = convert_robomimic(robomimic_source, tmp_path)
    assert summary.converted == 2
    assert "dataset 'obs/robot0_eef_pos' has 3 rows, the demonstration 5" in summary.failed[0].message


def test_a_demonstration_without_frames_is_refused_by_name(robomimic_source, tmp_path):  # noqa: F811
    with h5py.File(robomimic_source, "r+") as file:
        group = file["data/demo_1"]
        group.attrs["num_samples"] = 0
        del group["actions"]
        group["actions"] = np.zeros((0, 7))
    summary = convert_robomimic(robomimic_source, tmp_path)
    assert summary.converted == 2 and summary.failed[0].rule == "schema"
    assert "demo_1: has no frames" in summary.failed[0].message
