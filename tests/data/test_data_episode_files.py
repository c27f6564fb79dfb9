"""Episode files: what the writer promises and what the reader refuses."""

import os
import signal
import subprocess
import sys
import time

import cv2
import h5py
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_utils.errors import DataError
from data_utils.h5io import Episode, EpisodeWriter
from tests.data.episodes import CAMERAS, config, edited, poses, write_episode


def gradient(height=24, width=32):
    rows, columns = np.mgrid[0:height, 0:width]
    return np.stack([rows * 8, columns * 6, np.full((height, width), 40)], -1).astype(np.uint8)


def frame_arguments(t=0.0):
    return dict(
        timestamp=t,
        world_from_ee=poses(np.array([t]))[0],
        gripper=np.array([0.5]),
        images=dict.fromkeys(CAMERAS, gradient()),
        world_from_cam=dict.fromkeys(CAMERAS, np.eye(4)),
        K=dict.fromkeys(CAMERAS, np.diag([30.0, 30.0, 1.0])),
    )


def test_an_episode_reads_back_as_it_was_recorded(tmp_path):
    path = write_episode(tmp_path / "a.h5", frames=5, num_arms=2, desired=True, prompts=["lift it", "raise it"])
    with Episode(path) as episode:
        times = np.arange(5) * 0.5
        assert episode.cameras == CAMERAS and len(episode) == 5 and episode.prompts == ["lift it", "raise it"]
        np.testing.assert_allclose(episode.world_from_ee, poses(times, 2), atol=1e-6)
        np.testing.assert_allclose(episode.world_from_ee_desired, poses(times, 2, 0.5), atol=1e-6)
        np.testing.assert_array_equal(episode.times(), times)
        np.testing.assert_array_equal(episode.times(0.25), np.arange(5) * 0.25)
        assert episode.mask("front", 0) is None
        assert np.abs(episode.rgb("wrist", 3).astype(int) - (30, 100, 200)).max() <= 3


def test_colours_are_rgb_in_files_of_every_origin(tmp_path):
    ours, wanted = write_episode(tmp_path / "ours.h5", frames=2), np.array([10, 0, 200])

    def rewrite(name, jpeg_of, **attributes):
        path = tmp_path / name
        path.write_bytes(ours.read_bytes())
        with edited(path) as file:
            del file.attrs["jpeg_channels"], file.attrs["schema_version"]
            for key, value in attributes.items():
                file.attrs[key] = value
            image = np.full((24, 32, 3), wanted, np.uint8)
            for camera in CAMERAS:
                jpeg = cv2.imencode(".jpg", jpeg_of(image))[1].reshape(-1)
                for t in range(2):
                    file[f"{camera}/rgb"][t] = jpeg
        return path

    existing = rewrite("existing.h5", lambda rgb: rgb)  # RGB handed to OpenCV's encoder
    marked = rewrite("marked.h5", lambda rgb: np.ascontiguousarray(rgb[..., ::-1]), is_bgr=True)
    reversed_ = rewrite("reversed.h5", lambda rgb: rgb, jpeg_channels="bgr")
    for path in (ours, existing, marked, reversed_):
        assert np.abs(Episode(path).rgb("front", 1).astype(int) - wanted).max() <= 3, path.name


def test_jpegs_of_our_files_have_the_right_colours_in_any_viewer(tmp_path):
    Image = pytest.importorskip("PIL.Image")
    path = write_episode(tmp_path / "a.h5", frames=2)
    with h5py.File(path) as file:
        (tmp_path / "a.jpg").write_bytes(file["front/rgb"][1].tobytes())
    assert np.abs(np.asarray(Image.open(tmp_path / "a.jpg")).astype(int) - (10, 0, 200)).max() <= 3


def test_raw_frames_flat_grippers_and_fixed_cameras_are_read(tmp_path):
    path = write_episode(tmp_path / "a.h5", frames=3)
    image = gradient()
    with edited(path) as file:
        for key in ("ee_pose", "gripper"):
            values = file[key][:, 0]
            del file[key]
            file[key] = values
        del file["front/rgb"], file["front/pose"]
        file["front/rgb"] = np.stack([image.transpose(2, 0, 1)] * 3)
        file["front/pose"] = np.eye(4, dtype=np.float32)
    episode = Episode(path)
    np.testing.assert_array_equal(episode.rgb("front", 2), image)
    assert episode.world_from_ee.shape == (3, 1, 4, 4) and episode.gripper.shape == (3, 1)
    np.testing.assert_array_equal(episode.world_from_cam("front", 2), np.eye(4))


def test_a_change_that_was_not_sealed_is_refused(tmp_path):
    path = write_episode(tmp_path / "a.h5", frames=3)
    whole = path.read_bytes()

    def refused(change, key):
        path.write_bytes(whole)
        with h5py.File(path, "r+") as file:
            change(file)
        with pytest.raises(
            DataError, match=rf"a\.h5: {key} .*is not what was written|are not what was written"
        ) as caught:
            with Episode(path) as episode:
                episode.world_from_ee, episode.gripper, episode.times(), episode.rgb("front", 1)
        assert caught.value.rule == "checksum"

    def new_values(key, index, value):
        return lambda file: file[key].__setitem__(index, value)

    refused(new_values("ee_pose", (1, 0, 0, 3), 5.0), "ee_pose")
    refused(new_values("gripper", (1, 0), 0.0), "gripper")
    refused(new_values("timestamp", 2, 1.5), "timestamp")
    refused(lambda file: new_values("front/rgb", 1, file["front/rgb"][2])(file), "front/rgb")
    refused(lambda file: file.attrs.update({"prompt_text": "drop the cube"}), "attributes")


def test_files_of_a_newer_schema_are_refused(tmp_path):
    path = write_episode(tmp_path / "a.h5", frames=3)
    with edited(path) as file:
        file.attrs["schema_version"] = 99
    with pytest.raises(DataError, match="schema_version is 99; this library reads up to 2") as caught:
        Episode(path)
    assert caught.value.rule == "version"


def test_the_active_subtask_follows_the_prompt(tmp_path):
    path = write_episode(tmp_path / "a.h5", frames=6, prompts="tidy up")
    with edited(path) as file:
        file["subtask_description"] = ["grasp", "place"]
        file["subtask_start_index"] = [0, 4]
    episode = Episode(path)
    assert [episode.prompt(frame=t) for t in (0, 3, 4)] == ["tidy up grasp", "tidy up grasp", "tidy up place"]


@pytest.mark.parametrize(
    ("key", "change"),
    [
        ("ee_pose", lambda file: file.pop("ee_pose")),
        ("ee_pose", lambda file: _replace(file, "ee_pose", np.zeros((6, 1, 3, 4), np.float32))),
        ("ee_pose", lambda file: _replace(file, "ee_pose", np.zeros((6, 1, 4, 4), np.int64))),
        ("gripper", lambda file: file.pop("gripper")),
        ("gripper", lambda file: _replace(file, "gripper", np.zeros((5, 1), np.float32))),
        ("timestamp", lambda file: file.pop("timestamp")),
        ("timestamp", lambda file: _replace(file, "timestamp", np.array([b"0"] * 6))),
        ("wrist", lambda file: file.pop("wrist")),
        ("wrist/rgb", lambda file: file["wrist"].pop("rgb")),
        ("wrist/rgb", lambda file: _replace(file, "wrist/rgb", np.zeros((6, 24, 32, 3), np.uint8))),
        ("wrist/rgb", lambda file: _replace(file, "wrist/rgb", np.zeros((6, 3, 24, 32), np.float32))),
        ("wrist/pose", lambda file: _replace(file, "wrist/pose", np.zeros((5, 4, 4), np.float32))),
        ("wrist/K", lambda file: _replace(file, "wrist/K", np.zeros(4, np.float32))),
        ("wrist/mask", lambda file: _replace(file, "wrist/mask", np.zeros((5, 24, 32), bool))),
        ("gripper_desired", lambda file: file.pop("gripper_desired")),
        ("prompt_text", lambda file: file.attrs.pop("prompt_text")),
        ("prompt_text", lambda file: file.attrs.update({"prompt_text": ""})),
        ("subtask_start_index", lambda file: _replace(file, "subtask_description", ["a"])),
    ],
)
def test_a_wrong_header_is_refused_when_the_file_is_opened(tmp_path, key, change):
    path = write_episode(tmp_path / "a.h5", frames=6, desired=True)
    with edited(path) as file:
        change(file)
    with pytest.raises(DataError) as caught:
        Episode(path, CAMERAS)
    assert "a.h5" in str(caught.value) and key in str(caught.value) and "\n" not in str(caught.value)


def _replace(file, key, value):
    if key in file:
        del file[key]
    file[key] = value


def test_an_episode_of_one_frame_is_refused(tmp_path):
    path = write_episode(tmp_path / "a.h5", frames=2)
    with edited(path) as file:
        _replace(file, "ee_pose", np.eye(4, dtype=np.float32)[None, None])
    with pytest.raises(DataError, match="at least 2"):
        Episode(path)


@pytest.mark.parametrize(
    ("key", "frame", "damage", "read"),
    [
        ("ee_pose", 3, np.nan, lambda e: e.world_from_ee),
        ("ee_pose", 2, 2.0, lambda e: e.world_from_ee),
        ("ee_pose_desired", 4, np.inf, lambda e: e.world_from_ee_desired),
        ("gripper", 1, np.nan, lambda e: e.gripper),
        ("timestamp", 3, 0.1, lambda e: e.times()),
        ("timestamp", 3, np.nan, lambda e: e.times()),
        ("front/pose", 5, np.nan, lambda e: e.world_from_cam("front", 0)),
    ],
)
def test_bad_values_are_refused_by_file_key_and_frame_when_read(tmp_path, key, frame, damage, read):
    path = write_episode(tmp_path / "a.h5", frames=6, desired=True)
    with edited(path) as file:
        file[key][frame] = damage
    with Episode(path) as episode, pytest.raises(DataError, match=rf"a\.h5: {key} at frame {frame} "):
        read(episode)


@pytest.mark.parametrize("cut", [0, 10, 200, -2])
def test_a_cut_jpeg_is_refused_by_file_key_and_frame(tmp_path, cut):
    path = write_episode(tmp_path / "a.h5", frames=3)
    with edited(path) as file:
        file["front/rgb"][1] = file["front/rgb"][1][:cut]
    with Episode(path) as episode:
        episode.rgb("front", 0)
        with pytest.raises(DataError, match=r"a\.h5: front/rgb at frame 1 is not a whole JPEG"):
            episode.rgb("front", 1)


@pytest.fixture(scope="module")
def whole_file(tmp_path_factory):
    return write_episode(tmp_path_factory.mktemp("whole") / "a.h5", frames=4).read_bytes()


def read_everything(path):
    from data_utils.samples.dataset import H5DatasetMapBase

    dataset = H5DatasetMapBase([path], config(), train=False)
    for frame in range(4):
        dataset.sample(0, np.random.default_rng(0), frame)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_truncated_file_is_one_named_error(whole_file, tmp_path, data):
    length = data.draw(st.integers(0, len(whole_file) - 1))
    path = tmp_path / "cut.h5"
    path.write_bytes(whole_file[:length])
    with pytest.raises(DataError, match=r"cut\.h5"):
        read_everything(path)


def test_a_frame_of_another_size_is_refused(tmp_path):
    path = write_episode(tmp_path / "a.h5", frames=3)
    with edited(path) as file:
        file["front/rgb"][1] = cv2.imencode(".jpg", gradient(20, 20))[1].reshape(-1)
    with Episode(path) as episode:
        episode.rgb("front", 0)
        with pytest.raises(DataError, match=r"front/rgb at frame 1 is \(20, 20\)"):
            episode.rgb("front", 1)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (dict(timestamp=-1.0), "timestamp"),
        (dict(timestamp=0.0), "timestamp"),
        (dict(timestamp=np.nan), "timestamp"),
        (dict(world_from_ee=np.eye(4)), "ee_pose"),
        (dict(world_from_ee=2 * np.eye(4)[None]), "ee_pose"),
        (dict(world_from_ee=np.full((1, 4, 4), np.nan)), "ee_pose"),
        (dict(gripper=np.array([1.5])), "gripper"),
        (dict(gripper=np.array([0.5, 0.5])), "gripper"),
        (dict(images={"front": gradient()}), "wrist/rgb"),
        (dict(images=dict.fromkeys(CAMERAS, gradient().astype(np.float32))), "front/rgb"),
        (dict(images=dict.fromkeys(CAMERAS, gradient(20))), "front/rgb"),
        (dict(K=dict.fromkeys(CAMERAS, np.zeros((3, 3)))), "front/K"),
        (dict(world_from_cam=dict.fromkeys(CAMERAS, np.ones((4, 4)))), "front/pose"),
        (dict(world_from_ee_desired=np.eye(4)[None]), "gripper_desired"),
        (dict(world_from_ee_desired=np.eye(4)[None], gripper_desired=np.zeros(1)), "ee_pose_desired"),
    ],
)
def test_the_writer_refuses_a_wrong_frame_and_goes_on(tmp_path, change, named):
    path = tmp_path / "a.h5"
    with EpisodeWriter(path, CAMERAS, 1, "go") as writer:
        writer.add_frame(**frame_arguments(0.0))
        with pytest.raises(DataError, match=rf"frame 1: .*{named}"):
            writer.add_frame(**{**frame_arguments(1.0), **change})
        writer.add_frame(**frame_arguments(2.0))
    np.testing.assert_array_equal(Episode(path).times(), [0.0, 2.0])


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (dict(prompts=""), "prompts"),
        (dict(prompts=["lift it", ""]), "prompts"),
        (dict(prompts=None), "prompts"),
        (dict(cameras=[]), "cameras"),
        (dict(num_arms=0), "num_arms"),
        (dict(jpeg_quality=0), "jpeg_quality"),
    ],
)
def test_the_writer_refuses_wrong_arguments_by_name(tmp_path, change, named):
    arguments = dict(cameras=CAMERAS, num_arms=1, prompts="go")
    with pytest.raises(DataError, match=named):
        EpisodeWriter(tmp_path / "a.h5", **{**arguments, **change})


def test_an_exception_or_a_discard_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError), EpisodeWriter(tmp_path / "a.h5", CAMERAS, 1, "go") as writer:
        writer.add_frame(**frame_arguments())
        raise RuntimeError("the robot stopped")
    with EpisodeWriter(tmp_path / "a.h5", CAMERAS, 1, "go") as writer:
        writer.add_frame(**frame_arguments())
        writer.discard()
    with pytest.raises(DataError, match="at least 2"), EpisodeWriter(tmp_path / "a.h5", CAMERAS, 1, "go") as writer:
        writer.add_frame(**frame_arguments())
    assert list(tmp_path.iterdir()) == []


WRITE_FOREVER = """
import itertools, sys
from pathlib import Path
from tests.data.episodes import write_episode
for n in itertools.count():
    write_episode(Path(sys.argv[1]) / f"{n:06d}.h5", frames=40)
"""


def test_a_killed_recorder_leaves_only_whole_episodes(tmp_path):
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    process = subprocess.Popen(
        [sys.executable, "-c", WRITE_FOREVER, str(tmp_path)], cwd=root, env={**os.environ, "PYTHONPATH": root}
    )
    try:
        deadline = time.monotonic() + 60
        while len(list(tmp_path.glob("*.h5"))) < 5 and time.monotonic() < deadline:
            time.sleep(0.003)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    episodes = sorted(tmp_path.glob("*.h5"))
    assert len(episodes) >= 5
    for path in episodes:
        with Episode(path) as episode:
            assert len(episode) == 40
            episode.rgb("wrist", 39)
