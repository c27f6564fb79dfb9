"""The planner as a robot program uses it, on a really trained (if briefly) checkpoint."""

from __future__ import annotations

import copy
import dataclasses
import json
import threading

import cv2
import numpy as np
import pytest

from apt.checkpoint import checkpoint_sha256
from apt.infer.frame_window import FrameWindow
from apt.infer.frames import parse_frame
from apt.infer.open_loop import main as open_loop
from apt.infer.planner import TrajPlanner
from data_utils.datasets import PickPlaceCan
from tests.infer.helpers import frame_at
from tests.synthetic import write_episode
from tests.training.helpers import train


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, data_loc):
    folder = tmp_path_factory.mktemp("policy")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("APT_DATA_LOC", str(data_loc))
        assert train(folder, "run", max_iterations=2, ema_enabled=True, ema_start=0) == 0
    return folder / "ckpt" / "run" / "ckpt_latest.pt"


@pytest.fixture
def planner(checkpoint) -> TrajPlanner:
    planner = TrajPlanner(checkpoint, ensemble=0, steps=2)
    planner.set_prompt("reach for the red square")
    return planner


@pytest.fixture
def dataset(located) -> PickPlaceCan:
    config = dataclasses.replace(PickPlaceCan.config, image_hw=(64, 64))
    return PickPlaceCan(config=config, train=False)


def test_an_action_is_a_chunk_in_the_frames_clock(planner, dataset):
    assert planner.get_action() is None
    planner.add_obs_frame(frame_at(dataset, 0, 3))
    poses, grippers, times, image = planner.get_action(sample_num=3, draw_traj=True)
    assert poses.shape == (3, 32, 1, 4, 4) and grippers.shape == (3, 32, 1)
    np.testing.assert_allclose(times, 3 + np.arange(1, 33))
    rotations = poses[..., :3, :3]
    np.testing.assert_allclose(
        rotations @ np.swapaxes(rotations, -1, -2), np.broadcast_to(np.eye(3), rotations.shape), atol=1e-4
    )
    assert grippers.min() >= 0 and grippers.max() <= 1
    assert image.shape[0] > 288 and image.shape[1:] == (576, 3) and image.dtype == np.uint8
    packed = planner.get_action(draw_traj=True, compress_traj_img=True)[3]
    assert cv2.imdecode(np.frombuffer(packed, np.uint8), cv2.IMREAD_COLOR).shape[1:] == (576, 3)


def test_a_plan_can_be_repeated_from_its_seed(checkpoint, dataset):
    plans = []
    for seed in (1, 1, 2):
        planner = TrajPlanner(checkpoint, ensemble=0, seed=seed, steps=2)
        planner.set_prompt("reach for the red square")
        planner.add_obs_frame(frame_at(dataset, 0, 3))
        plans.append(planner.get_action()[0])
    assert np.array_equal(plans[0], plans[1]) and not np.array_equal(plans[0], plans[2])


def test_noise_begins_anew_where_an_episode_is_given_a_seed(planner, dataset):
    plans = []
    for seed in (5, None, 6, 5):
        planner.reset(seed)
        planner.add_obs_frame(frame_at(dataset, 0, 3))
        plans.append(planner.get_action()[0])
    np.testing.assert_array_equal(plans[0], plans[3])
    assert not np.array_equal(plans[0], plans[1]) and not np.array_equal(plans[0], plans[2])


def test_ensembling_blends_and_reset_forgets(checkpoint, dataset):
    planner = TrajPlanner(checkpoint, ensemble=4, steps=2)
    raw = TrajPlanner(checkpoint, ensemble=0, steps=2)
    for each in (planner, raw):
        each.set_prompt("reach for the red square")
    for time in (3, 5):
        for each in (planner, raw):
            each.add_obs_frame(frame_at(dataset, 0, time))
        blended, single = planner.get_action()[0], raw.get_action()[0]
        assert np.allclose(blended, single) == (time == 3)
    for each in (planner, raw):
        each.reset()
        assert each.get_action() is None
        each.add_obs_frame(frame_at(dataset, 0, 0))
    np.testing.assert_allclose(planner.get_action()[0], raw.get_action()[0])


def half_size(frame: dict) -> None:
    camera = frame["e2h_cam"]
    camera["data"]["color"] = np.ascontiguousarray(camera["data"]["color"][::2, ::2])
    camera["camera"].update(width=48, height=48)
    if camera["data"]["seg"] is not None:
        camera["data"]["seg"] = camera["data"]["seg"][::2, ::2]


def broken(frame: dict, change) -> dict:
    frame = copy.deepcopy(frame)
    change(frame)
    return frame


@pytest.mark.parametrize(
    "change, named",
    [
        (lambda f: f.pop("eih_cam"), "eih_cam"),
        (lambda f: f["e2h_cam"]["data"].pop("wcT"), "e2h_cam.data.wcT"),
        (lambda f: f["e2h_cam"]["data"].update(color=np.zeros((4, 4), np.uint8)), "e2h_cam.data.color"),
        (lambda f: f["e2h_cam"]["camera"].update(height=7), "e2h_cam.camera"),
        (lambda f: f["e2h_cam"]["camera"].update(K=np.zeros((3, 3))), r"e2h_cam.camera.K has the last row"),
        (lambda f: f["e2h_cam"]["camera"].update(K=np.diag([9.0, -9.0, 1.0])), r"e2h_cam.camera.K .* 9 and -9"),
        (lambda f: f["ee_pose"].__setitem__((0, 0, 3), np.nan), "ee_pose"),
        (lambda f: f["ee_pose"].__setitem__((0, slice(0, 3), 0), 2.0), r"ee_pose\[0\]"),
        (lambda f: f.update(gripper=np.array([1.5])), "gripper"),
        (lambda f: f.update(gripper=np.zeros(2)), "gripper"),
        (lambda f: f.update(timestamp=0.0), "timestamp"),
        (lambda f: f.pop("timestamp"), "timestamp"),
        (lambda f: f.update(ee_pose=np.tile(np.eye(4), (2, 1, 1)), gripper=np.zeros(2)), "ee_pose"),
        (lambda f: f["eih_cam"]["data"].update(color=np.zeros((96, 96, 3))), "eih_cam.data.color"),
        (half_size, r"e2h_cam.data.color is 48x48, earlier frames .*96x96.*reset\(\)"),
    ],
)
def test_a_bad_frame_is_named_and_the_next_plan_is_as_if_it_had_never_come(planner, dataset, change, named):
    other = planner.session()
    other.set_prompt("reach for the red square")
    for each in (planner, other):
        each.add_obs_frame(frame_at(dataset, 0, 3))
    with pytest.raises(ValueError, match=named):
        planner.add_obs_frame(broken(frame_at(dataset, 0, 4), change))
    plans = [each.get_action() for each in (planner, other)]
    for one, two in zip(*plans, strict=True):
        assert one is two is None or np.array_equal(one, two)
    planner.add_obs_frame(frame_at(dataset, 0, 4))


def test_after_a_reset_images_may_have_another_size(planner, dataset):
    planner.add_obs_frame(frame_at(dataset, 0, 3))
    planner.reset()
    planner.add_obs_frame(broken(frame_at(dataset, 0, 4), half_size))
    assert planner.get_action()[0].shape == (1, 32, 1, 4, 4)


def test_frames_before_the_window_are_dropped(dataset):
    window = FrameWindow(dataset.config)
    for time in range(12):
        window.add([frame_at(dataset, 0, time)])
    assert len(window) == 1 and window.newest.timestamp == frame_at(dataset, 0, 11)["timestamp"]


def test_colour_encodings_agree(dataset):
    frame = frame_at(dataset, 0, 0)
    rgb = frame["e2h_cam"]["data"]["color"]
    frame["e2h_cam"]["data"].update(color=rgb[..., ::-1], encoding="bgr")
    assert np.array_equal(parse_frame(frame, dataset.config).cameras["e2h_cam"].rgb, rgb)
    packed = cv2.imencode(".jpg", rgb[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 100])[1].tobytes()
    frame["e2h_cam"]["data"].update(color=packed, encoding="rgb")
    with pytest.raises(ValueError, match='e2h_cam.data.color is bytes.*"encoding": "compress"'):
        parse_frame(frame, dataset.config)
    frame["e2h_cam"]["data"].update(color=packed, encoding="compress")
    decoded = parse_frame(frame, dataset.config).cameras["e2h_cam"].rgb
    assert np.abs(decoded.astype(int) - rgb).mean() < 6


def test_a_single_arm_pose_may_lack_the_arm_axis(dataset):
    frame = frame_at(dataset, 0, 0)
    plain = parse_frame(frame, dataset.config)
    frame.update(ee_pose=frame["ee_pose"][0], gripper=float(frame["gripper"][0]))
    single = parse_frame(frame, dataset.config)
    assert np.array_equal(plain.world_from_ee, single.world_from_ee)
    assert np.array_equal(plain.gripper, single.gripper)


def test_frames_may_be_added_while_another_thread_plans(planner, dataset):
    planner.add_obs_frame(frame_at(dataset, 0, 0))
    plans, failures = [], []

    def plan():
        try:
            plans.extend(planner.get_action()[2][0] for _ in range(6))
        except Exception as error:  # noqa: BLE001 - whatever it is, the test shows it
            failures.append(error)

    thread = threading.Thread(target=plan)
    thread.start()
    for time in range(1, 20):
        planner.add_obs_frame(frame_at(dataset, 0, time))
    thread.join(timeout=60)
    assert not failures and len(plans) == 6 and plans == sorted(plans)


def test_averaged_weights_are_others_than_the_last_ones(checkpoint, dataset):
    plans = []
    for use_ema in (False, True):
        planner = TrajPlanner(checkpoint, ensemble=0, use_ema=use_ema, steps=2)
        planner.set_prompt("go")
        planner.add_obs_frame(frame_at(dataset, 0, 3))
        plans.append(planner.get_action()[0])
    assert not np.array_equal(*plans)


def test_a_prior_that_follows_no_instruction_says_so(tmp_path, located, caplog):
    assert train(tmp_path, "prior", max_iterations=1, train_stage=0) == 0
    TrajPlanner(tmp_path / "ckpt" / "prior" / "ckpt_latest.pt", ensemble=0, steps=2)
    assert "is a VA prior: it wants an instruction and does not follow it" in caplog.text


def test_open_loop_says_what_it_measured_with_and_whether_training_saw_the_episodes(
    checkpoint, episode_dir, tmp_path, capsys
):
    apart = tmp_path / "apart"
    apart.mkdir()
    for number in (0, 1):
        (apart / f"ep{number:03d}.h5").symlink_to(episode_dir / f"ep{number:03d}.h5")
    other = tmp_path / "other.h5"
    write_episode(other, 9)
    common = ["--ckpt", str(checkpoint), "--train-episodes", str(episode_dir), "--device", "cpu"]
    few = ["--every", "16", "--steps", "2"]
    for episodes, known in ((apart, 2), (other, 0)):
        out = tmp_path / f"out of {episodes.name}"
        assert open_loop([*common, *few, "--episodes", str(episodes), "--out", str(out)]) == 0
        assert (f"{known} of these episodes are among those for training" in capsys.readouterr().out) == bool(known)
        said = json.loads((out / "open_loop.json").read_text())
        assert said["among_training"] == known and said["sampling"]["steps"] == 2 and said["every"] == 16
        assert said["sha256"] == checkpoint_sha256(checkpoint) and said["ckpt"] == str(checkpoint)
        assert len(list(out.glob("episode_*.png"))) == len(said["episodes"])


def test_open_loop_says_in_one_line_what_it_cannot_do(checkpoint, episode_dir, tmp_path, monkeypatch, capsys):
    (tmp_path / "data_loc.yaml").write_text("default:\n")
    monkeypatch.setenv("APT_DATA_LOC", str(tmp_path / "data_loc.yaml"))
    common = ["--ckpt", str(checkpoint), "--episodes", str(episode_dir), "--device", "cpu"]
    for flags, named in (
        (["--every", "0"], "--every is 0; wanted"),
        (["--sampler", "euler"], "'euler'"),
        ([], "or name the episodes with --train-episodes DIR"),
    ):
        assert open_loop([*common, *flags]) == 2
        said = capsys.readouterr().err.strip().splitlines()[-1]
        assert said.startswith("error: ") and named in said
