"""LeRobot datasets that are not what they say, in rows, tables, columns, texts or sizes: refused by name, or right.

Frames carry their own colour, so that a wrong one shows.
"""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data_utils.convert import lerobot
from data_utils.convert.lerobot_layout import Layout
from data_utils.convert.pairing import Pairing, Share, paired
from data_utils.errors import DataError
from data_utils.h5io import Episode
from data_utils.video.index import VideoIndex
from tests.convert import datasets
from tests.convert.test_lerobot_conversion import content, convert, mapping_file


def outcome(source: Path, tmp_path: Path, **changes) -> dict[str, str]:
    """By episode: the fault that it was refused for, "" where it was converted."""
    out = tmp_path / f"out_{len(list(tmp_path.glob('out_*')))}"
    summary = convert(source, out, mapping_file(tmp_path, **changes))
    found = {path.stem: "" for path in out.rglob("episode_*.h5")}
    return found | {Path(fault.episode).name: f"{fault.rule}: {fault.message}" for fault in summary.failed}


def frames_are_right(out: Path, episodes: list[datasets.Episode]) -> bool:
    for index, episode in enumerate(episodes):
        with Episode(out / f"chunk-000/episode_{index:06d}.h5") as read:
            for t in range(len(read)):
                if np.abs(read.rgb("front", t).astype(int) - episode.videos["images.front"][t]).max() > 3:
                    return False
    return True


def rewrite(path: Path, change) -> None:
    """A parquet file with ``change`` made to its columns (a dictionary of lists)."""
    columns = pq.read_table(path).to_pydict()
    change(columns)
    pq.write_table(pa.table(columns), path)


def change_data(source: Path, change, episode: int = 0) -> None:
    rewrite(source / f"data/chunk-000/episode_{episode:06d}.parquet", change)


@pytest.fixture
def v21(tmp_path):
    return datasets.write_v21(tmp_path / "v21", content())


@pytest.fixture
def v30(tmp_path):
    return datasets.write_v30(tmp_path / "v30", content(), per_file=3)


# -- rows and frames -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("warp", [
    lambda t: t * 1.03, lambda t: t * 0.97, lambda t: t + 0.06, lambda t: t - 0.002,
    lambda t: t + np.array([0, 0.03, -0.03] * 2), lambda t: t + 0.1, lambda t: t * 2,
], ids=["fast", "slow", "half a frame", "2 ms", "jitter", "one frame", "twice"])  # fmt: skip
def test_rows_of_another_clock_than_the_frames_are_refused_with_the_worst_distance(v21, tmp_path, warp):
    change_data(v21, lambda columns: columns.update(timestamp=warp(np.array(columns["timestamp"])).tolist()))
    found = outcome(v21, tmp_path)
    assert found["episode_000000"].startswith("video: ") and " s" in found["episode_000000"]
    assert found["episode_000001"] == found["episode_000002"] == ""


@pytest.mark.parametrize("shift", [-0.045, -0.06, -0.1, 0.06, 0.1, 0.033])
def test_an_episode_that_begins_elsewhere_in_a_shared_video_never_has_anothers_frame(v30, tmp_path, shift):
    def change(columns: dict) -> None:
        for camera in ("front", "hand"):
            key = f"videos/images.{camera}/from_timestamp"
            columns[key] = [begin + (shift if begin else 0) for begin in columns[key]]

    rewrite(v30 / "meta/episodes/chunk-000/file-000.parquet", change)
    found = outcome(v30, tmp_path)
    assert found["episode_000000"] == "" and all(found[f"episode_00000{i}"].startswith("video: ") for i in (1, 2))


def test_a_mapping_may_widen_the_tolerance_or_pair_by_number_and_the_file_says_so(v21, tmp_path):
    for index in range(3):
        change_data(v21, lambda c: c.update(timestamp=[t + 0.001 * (t > 0) for t in c["timestamp"]]), index)
    assert all(outcome(v21, tmp_path).values())
    for pairing, said in (
        ({"tolerance": 0.01}, "by time, within 0.01 s"),
        ({"by": "number"}, "by number"),
        ({"tolerance": 0.01, "repeats": True}, "by time, within 0.01 s, frames may repeat"),
    ):
        out = tmp_path / f"paired_{len(said)}"
        assert convert(v21, out, mapping_file(tmp_path, pairing=pairing)).converted == 3
        assert frames_are_right(out, content())
        with Episode(out / "chunk-000/episode_000000.h5") as episode:
            assert episode.attributes["pairing"] == said
    with pytest.raises(DataError, match="line .*: pairing: by is 'name'; wanted time or number"):
        outcome(v21, tmp_path, pairing={"by": "name"})


def test_fewer_or_more_frames_than_rows_do_not_pair_by_number(v21, tmp_path):
    video = v21 / "videos/chunk-000/images.front/episode_000000.mp4"
    for count in (5, 7):
        video.unlink()
        datasets.write_video(video, datasets.frames(count))
        found = outcome(v21, tmp_path, pairing={"by": "number"})
        assert f"has {count} frames for 6 rows" in found["episode_000000"] and found["episode_000001"] == ""


def index_of(times: np.ndarray) -> VideoIndex:
    interval = float(np.median(np.diff(times))) if len(times) > 1 else 0.1
    return VideoIndex("v.mp4", "h264", np.arange(len(times)), times, interval, np.arange(1), False, True)


@settings(max_examples=300, deadline=None)
@given(
    frames=st.integers(1, 40), before=st.integers(0, 20), after=st.integers(0, 20), seed=st.integers(0, 9),
    fps=st.sampled_from([5, 10, 29.97, 60]), scale=st.sampled_from([1.0, 1.0, 0.9, 1.001, 2.0]),
    shift=st.floats(-0.2, 0.2), tolerance=st.sampled_from([1e-4, 0.01, 0.1]), known=st.booleans(),
)  # fmt: skip
def test_whatever_the_clocks_a_row_has_its_own_frame_within_the_tolerance_or_is_refused(
    frames, before, after, fps, scale, shift, seed, tolerance, known
):
    video = np.arange(before + frames + after) / fps
    rows = before / fps + np.arange(frames) / fps * scale + shift * (seed % 2)
    share = Share(before, len(video) if known else len(video) + 1)
    try:
        found = paired(index_of(video), rows, Pairing(tolerance=tolerance), share)
    except DataError as error:
        assert error.rule == "video"
        return
    numbers = [int(np.argmin(np.abs(video - time))) for time in found]
    assert np.abs(video[numbers] - rows).max() <= tolerance + 1e-9
    assert (np.diff(numbers) >= 1).all() and (not known or numbers[0] == before)


# -- tables --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row, complaint", [
    ({"length": 0}, "has length 0; wanted at least 1"), ({"length": None}, "has length None; wanted a whole number"),
    ({"length": -3}, "has length -3"), ({"length": "6"}, "has length '6'"), ({"length": 6.5}, "has length 6.5"),
    ({"length": 7}, "holds 6 frames of it; the metadata say 7"),
])  # fmt: skip
def test_a_broken_row_of_the_table_refuses_its_episode_alone(v21, tmp_path, row, complaint):
    path = v21 / "meta/episodes.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[0] |= row
    path.write_text("".join(json.dumps(item) + "\n" for item in rows))
    found = outcome(v21, tmp_path)
    assert complaint in found["episode_000000"] and found["episode_000001"] == found["episode_000002"] == ""


def test_an_episode_listed_twice_is_refused_and_one_without_a_number_is_named_by_its_row(v21, tmp_path):
    path = v21 / "meta/episodes.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines, lines[1], '{"episode_index": "x", "length": 3}', "[1, 2]"]) + "\n")
    found = outcome(v21, tmp_path)
    assert "is listed 2 times" in found["episode_000001"] and found["episode_000000"] == found["episode_000002"] == ""
    assert "has episode_index 'x'; wanted a whole number" in found["row_000004"]
    assert "is no mapping from names" in found["row_000005"]


@pytest.mark.parametrize(
    "text, complaint", [("", "table of episodes is empty"), ('{"episode_index": 0}\n', "lacks 'length'")]
)
def test_a_table_that_is_of_no_use_at_all_ends_the_conversion(v21, tmp_path, text, complaint):
    (v21 / "meta/episodes.jsonl").write_text(text)
    with pytest.raises(DataError, match=complaint):
        outcome(v21, tmp_path)


def test_rows_in_another_order_are_sorted_by_frame_and_doubled_ones_refused(v21, tmp_path):
    def turned(columns: dict) -> None:
        for key in columns:
            columns[key] = columns[key][::-1]

    change_data(v21, turned)
    change_data(v21, lambda columns: columns.update(frame_index=[0, 1, 2, 2, 4, 5, 6]), 1)
    found = outcome(v21, tmp_path)
    assert (
        found["episode_000000"] == "" and "column 'frame_index' has no 3, or another twice" in found["episode_000001"]
    )
    with Episode(tmp_path / "out_0/chunk-000/episode_000000.h5") as episode:
        np.testing.assert_array_equal(episode.world_from_ee[:, 0, :3, 3], content()[0].columns["state"][:, :3])
    assert frames_are_right(tmp_path / "out_0", content()[:1])


def test_equal_time_stamps_are_refused(v21, tmp_path):
    change_data(v21, lambda columns: columns.update(timestamp=[0, 0.1, 0.1, 0.3, 0.4, 0.5]))
    assert "time: " in outcome(v21, tmp_path)["episode_000000"]


# -- columns -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change, complaint", [
    (lambda rows: rows[:2] + [rows[2][:7], rows[3] + [0.0]] + rows[4:], "has 7 numbers, 8 before, at frame 2"),
    (lambda rows: rows[:4] + [None] + rows[5:], "is empty at frame 4"),
    (lambda rows: rows[:4] + [rows[4][:3] + [None] + rows[4][4:]] + rows[5:], "is empty at frame 4"),
    (lambda rows: [[]] * len(rows), "holds null; wanted numbers"),
])  # fmt: skip
def test_a_ragged_column_is_refused_by_name_and_frame(v21, tmp_path, change, complaint):
    change_data(v21, lambda columns: columns.update(state=change(columns["state"])))
    found = outcome(v21, tmp_path)["episode_000000"]
    assert f"column 'state' {complaint}" in found


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(0, 5), min_size=6, max_size=6))
def test_numbers_never_move_from_row_to_row(tmp_path_factory, lengths):
    folder = tmp_path_factory.getbasetemp() / "ragged"
    if not folder.exists():
        datasets.write_v21(folder, content(1, hand_is_image=True))
    rows = [[float(row)] * length for row, length in enumerate(lengths)]
    change_data(folder, lambda columns: columns.update(state=rows))
    layout = Layout(folder)
    ((place,), _) = layout.episodes()
    _open_anew()
    try:
        found = lerobot._Episode(layout, place, {}, Pairing()).numbers("state")
    except DataError as error:
        assert error.rule == "schema"
        return
    assert len(set(lengths)) == 1 and found.tolist() == rows


def _open_anew() -> None:
    lerobot._open_parquet.cache_clear()
    lerobot._episode_rows.cache_clear()


# -- texts ---------------------------------------------------------------------------------------------------------


def with_tasks(source: Path, lines: list[str]) -> None:
    (source / "meta/tasks.jsonl").write_text("".join(f"{line}\n" for line in lines))


@pytest.mark.parametrize("task", ["null", "NaN", '["open", "it"]', "7", "{}"])
def test_a_task_that_is_no_text_refuses_the_episodes_that_have_it(v21, tmp_path, task):
    with_tasks(v21, ['{"task_index": 0, "task": "push cup 0"}', f'{{"task_index": 1, "task": {task}}}'])
    found = outcome(v21, tmp_path)
    assert found["episode_000000"] == found["episode_000002"] == ""
    assert found["episode_000001"].startswith("prompt: ") and "wanted a text" in found["episode_000001"]


def test_a_task_number_that_is_there_twice_refuses_the_episodes_that_have_it(v21, tmp_path):
    with_tasks(
        v21, ['{"task_index": 0, "task": "a"}', '{"task_index": 1, "task": "b"}', '{"task_index": 1, "task": "c"}']
    )
    found = outcome(v21, tmp_path)
    assert "prompt: " in found["episode_000001"] and "is listed twice" in found["episode_000001"]
    assert found["episode_000000"] == ""


@pytest.mark.parametrize("text", ["a\u2028b", "a\u0085b", "a\x0bb", "把杯子 🤖", "two\nlines"])
def test_texts_arrive_whole_whatever_characters_they_have(v21, tmp_path, text):
    with_tasks(v21, [json.dumps({"task_index": i, "task": f"{text} {i}"}, ensure_ascii=False) for i in range(2)])
    path = v21 / "meta/episodes.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())  # a byte-order mark
    assert set(outcome(v21, tmp_path).values()) == {""}
    with Episode(tmp_path / "out_0/chunk-000/episode_000000.h5") as episode:
        assert episode.prompts[0] == f"{text} 0"


def test_a_task_that_changes_inside_an_episode_becomes_sub_tasks_where_the_mapping_says_so(v21, tmp_path):
    change_data(v21, lambda columns: columns.update(task_index=[0, 0, 1, 1, 1, 0]))
    found = outcome(v21, tmp_path)["episode_000000"]
    assert "its task changes at frame 2, from 'push cup 0' to 'push cup 1'" in found and "subtasks: task_index" in found
    found = outcome(v21, tmp_path, subtasks="task_index", prompts=[{"text": "tidy up"}])
    assert set(found.values()) == {""}
    with Episode(tmp_path / "out_1/chunk-000/episode_000000.h5") as episode:
        assert episode.prompts == ["tidy up"]
        assert episode.subtasks == [(0, "push cup 0"), (2, "push cup 1"), (5, "push cup 0")]


# -- images --------------------------------------------------------------------------------------------------------


def test_the_size_of_images_is_that_of_a_decoded_one_and_a_contradiction_is_said(tmp_path):
    source = datasets.write_v21(tmp_path / "v21", content(1, hand_is_image=True))
    path = source / "meta/info.json"
    info = json.loads(path.read_text())
    for key in ("images.front", "images.hand"):
        info["features"][key]["shape"] = [64, 48, 3]
    path.write_text(json.dumps(info))
    assert outcome(source, tmp_path) == {"episode_000000": ""}
    with Episode(tmp_path / "out_0/chunk-000/episode_000000.h5") as episode:
        np.testing.assert_allclose(episode.K("hand", 0), [[40, 0, 32], [0, 40, 24], [0, 0, 1]])
        assert "images.hand is 64 x 48, not 48 x 64 as info.json says" in episode.attributes["sizes"]


def test_depth_is_not_taken_for_colours(v21, tmp_path):
    path = v21 / "meta/info.json"
    info = json.loads(path.read_text())
    info["features"]["images.front"]["info"] = {"video.is_depth_map": True}
    path.write_text(json.dumps(info))
    assert "column 'images.front' is a depth map" in outcome(v21, tmp_path)["episode_000000"]

    source = datasets.write_v21(tmp_path / "png", content(1, hand_is_image=True))

    def sixteen_bits(columns: dict) -> None:
        stream = io.BytesIO()
        Image.fromarray(np.full((48, 64), 700, np.uint16)).save(stream, "png")
        columns["images.hand"] = [{**cell, "bytes": stream.getvalue()} for cell in columns["images.hand"]]

    change_data(source, sixteen_bits)
    assert "has 16 bits per number, as depth images do" in outcome(source, tmp_path)["episode_000000"]
