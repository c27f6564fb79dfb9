"""From episodes to samples: what the dictionary holds and where its values come from."""

import os
import pickle
import resource
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import h5py
import numpy as np
import pytest

from data_utils.batches.collate import Collator
from data_utils.batches.loader import kept_open
from data_utils.config import DataConfig
from data_utils.datasets import DATASETS, Droid, PickPlaceCan, get_dataset_class
from data_utils.errors import DataError
from data_utils.geometry.camera import CameraFrame
from data_utils.h5io import Episode, seal
from data_utils.samples.augment import draw_augmentation, saturation_matrix, tone_table
from data_utils.samples.dataset import H5DatasetMapBase
from data_utils.samples.observation import StateTrack, make_sample, policy_from_robot_ee, robot_from_policy_ee
from tests.data.episodes import CAMERAS, camera_pose, config, edited, poses, tokenize, write_episode

ROOT = Path(__file__).resolve().parents[2]


def rng(seed=0):
    return np.random.default_rng(seed)


def states(times, arms=1, frames=12):
    """(Q, Nee, 17) of the test episode, clamped."""
    times = np.clip(times, 0, (frames - 1) * 0.5)
    openness = np.repeat((times / 0.5 / frames)[:, None, None], arms, 1)
    return np.concatenate([poses(times, arms).reshape(len(times), arms, 16), openness], -1)


@pytest.fixture
def episode(tmp_path):
    return write_episode(tmp_path / "a.h5")


def test_an_item_is_the_documented_dictionary(episode):
    item = H5DatasetMapBase([episode], config(num_obs=2))[0]
    shapes = {key: (value.shape, value.dtype) for key, value in item.items() if key != "prompt_text"}
    assert shapes == {
        "obs_rgbs": ((2, 2, 3, 32, 32), np.float32),
        "obs_masks": ((2, 2, 32, 32), bool),
        "obs_norm_xys": ((2, 2, 2, 32, 32), np.float32),
        "obs_extrinsics": ((2, 2, 4, 4), np.float32),
        "K": ((2, 3, 3), np.float32),
        "current_ee_pose": ((1, 4, 4), np.float32),
        "action_ref_pose": ((1, 4, 4), np.float32),
        "history_ee_states": ((3, 1, 17), np.float32),
        "gt_future_ee_states": ((4, 1, 17), np.float32),
        "timestamps": ((), np.float64),
        "valid_ee_mask": ((1,), bool),
        "gripper_mask": ((1,), bool),
    }
    assert item["prompt_text"] == "pick up the cube"
    assert item["obs_rgbs"].min() >= 0 and 0.7 < item["obs_rgbs"].max() <= 1
    x = (np.arange(32) - item["K"][0, 0, 2]) / item["K"][0, 0, 0]
    np.testing.assert_allclose(item["obs_norm_xys"][1, 0, 0, 5], x, rtol=1e-6)


def test_history_ends_now_and_the_future_starts_one_gap_later(episode):
    sample = H5DatasetMapBase([episode], config(sample_state_gaps=2), train=False).sample(0, rng(), frame=5)
    now = 2.5
    np.testing.assert_allclose(sample.history, states(now + np.array([-2.0, -1.0, 0.0])), atol=1e-6)
    np.testing.assert_allclose(sample.future, states(now + np.array([1.0, 2.0, 3.0, 4.0])), atol=1e-6)
    np.testing.assert_allclose(sample.world_from_ee, poses(np.array([now]))[0], atol=1e-6)
    assert sample.timestamp == now and sample.source.endswith("a.h5 frame 5")


def test_states_between_frames_are_interpolated_and_clamped_at_the_end(episode):
    sample = H5DatasetMapBase([episode], config(sample_dt=0.2), train=False).sample(0, rng(), frame=10)
    np.testing.assert_allclose(sample.future, states(5.0 + np.array([0.2, 0.4, 0.6, 0.8])), atol=1e-6)
    np.testing.assert_array_equal(sample.future[2], sample.future[3])


def test_record_dt_replaces_the_stored_times(episode):
    sample = H5DatasetMapBase([episode], config(record_dt=0.1, sample_dt=0.1), train=False).sample(0, rng(), frame=4)
    assert sample.timestamp == pytest.approx(0.4)
    np.testing.assert_allclose(sample.future, states(2.0 + np.array([0.5, 1.0, 1.5, 2.0])), atol=1e-6)


def test_commands_are_the_future_and_lead_by_one_step(tmp_path):
    path = write_episode(tmp_path / "a.h5", desired=True)
    sample = H5DatasetMapBase([path], config(), train=False).sample(0, rng(), frame=3)
    # The command at step t is the state at t + 1, so commands read one step earlier are the future states.
    np.testing.assert_allclose(sample.future, states(1.5 + np.array([0.5, 1.0, 1.5, 2.0])), atol=1e-6)
    np.testing.assert_allclose(sample.history[-1], states(np.array([1.5]))[0], atol=1e-6)


def test_observed_frames_are_the_nearest_ones(episode):
    sample = H5DatasetMapBase([episode], config(num_obs=3, sample_camera_gaps=2), train=False).sample(0, rng(), frame=3)
    reds = sample.rgb[:, 0, 0, 16, 16].astype(int)
    assert np.abs(reds - [0, 10, 30]).max() <= 3


def test_without_training_cameras_keep_the_configured_order(episode):
    dataset = H5DatasetMapBase([episode], config(cameras=("wrist", "front"), ee_ref_cams=()), train=False)
    for seed in range(5):
        sample = dataset.sample(0, rng(seed), frame=2)
        np.testing.assert_array_equal(sample.world_from_cam[0], np.stack([camera_pose(1), camera_pose(0)]))
        np.testing.assert_array_equal(sample.world_from_ref[0], camera_pose(1))


def test_training_draws_camera_order_and_reference_camera_together_with_their_poses(episode):
    dataset = H5DatasetMapBase([episode], config())
    orders, references = set(), set()
    for seed in range(20):
        sample = dataset.sample(0, rng(seed), frame=2)
        greens = sample.rgb[0, :, 1, 16, 16]
        assert [round(float(x)) for x in sample.world_from_cam[0, :, 0, 3]] == [int(green > 50) for green in greens]
        orders.add(tuple(sample.world_from_cam[0, :, 0, 3]))
        references.add(float(sample.world_from_ref[0, 0, 3]))
    assert len(orders) == 2 and references == {0.0, 1.0}


def test_one_generator_gives_one_sample(episode):
    dataset = H5DatasetMapBase([episode], config(aug_crop=True, aug_color=True, aug_blur=True, aug_background=True))
    first, second = dataset.sample(0, rng(7)), dataset.sample(0, rng(7))
    for key, value in vars(first).items():
        np.testing.assert_array_equal(value, getattr(second, key))


def test_the_files_choice_of_arms_overrides_and_missing_arms_are_padded(tmp_path):
    path = write_episode(tmp_path / "a.h5", num_arms=3)
    two = config(ee_indices=(1, 2), ee_ref_cams=(("front",), ("wrist",)))
    sample = H5DatasetMapBase([path], two, train=False).sample(0, rng(), frame=2)
    np.testing.assert_allclose(sample.world_from_ee[:, 1, 3], [1, 2])
    np.testing.assert_array_equal(sample.world_from_ref[:, 0, 3], [0, 1])
    assert sample.valid_ee.tolist() == [True, True]
    with edited(path) as file:
        file.attrs["ee_indices"] = [2]
    sample = H5DatasetMapBase([path], two, train=False).sample(0, rng(), frame=2)
    np.testing.assert_allclose(sample.world_from_ee[:, 1, 3], [2, 0])
    assert sample.valid_ee.tolist() == sample.gripper_mask.tolist() == [True, False]
    with edited(path) as file:
        file.attrs["ee_indices"] = [7]
    with pytest.raises(DataError, match="ee_indices"):
        H5DatasetMapBase([path], two, train=False).sample(0, rng(), frame=2)


def test_the_end_effector_offset_moves_along_its_own_axis_and_back():
    moved = DataConfig(cameras=("a",), ee_offset_z=0.15)
    pose = poses(np.array([1.0, 2.0]))
    pose[..., :3, :3] = pose[..., :3, :3] @ np.array([[1, 0, 0], [0, 0, 1], [0, -1, 0.0]])  # z now lies in the plane
    shifted = policy_from_robot_ee(pose, moved)
    np.testing.assert_allclose(shifted[..., :3, 3] - pose[..., :3, 3], 0.15 * pose[..., :3, 2], atol=1e-12)
    np.testing.assert_allclose(robot_from_policy_ee(shifted, moved), pose, atol=1e-12)


def test_the_offset_reaches_states_and_commands(tmp_path):
    path = write_episode(tmp_path / "a.h5", desired=True)
    sample = H5DatasetMapBase([path], config(ee_offset_z=0.15), train=False).sample(0, rng(), frame=2)
    for pose in (sample.world_from_ee[:, 2, 3], sample.history[:, 0, 11], sample.future[:, 0, 11]):
        np.testing.assert_allclose(pose, 0.15, atol=1e-6)


def test_serving_and_training_share_one_path_bit_for_bit(episode):
    dataset = H5DatasetMapBase([episode], config(sample_dt=0.3), train=False)
    sample = dataset.sample(0, rng(), frame=6)
    with Episode(episode) as file:
        frames = [{c: CameraFrame(file.rgb(c, 6), file.K(c, 6), file.world_from_cam(c, 6)) for c in reversed(CAMERAS)}]
        window = slice(3, 7)  # a planner remembers the recent past only
        track = StateTrack(file.timestamps[window], file.world_from_ee[window], file.gripper[window])
        served = make_sample(dataset.config, frames, track, 3.0, "pick up the cube")
    assert served.future is None
    for key, value in vars(served).items():
        if key not in ("future", "source"):
            np.testing.assert_array_equal(value, getattr(sample, key))


def test_frames_that_do_not_fit_the_config_are_refused():
    frame = CameraFrame(np.zeros((8, 8, 3), np.uint8), np.eye(3), np.eye(4))
    track = StateTrack(np.array([0.0]), np.eye(4)[None, None], np.zeros((1, 1)))
    with pytest.raises(ValueError, match="'wrist' is missing"):
        make_sample(config(sample_dt=1.0), [{"front": frame}], track, 0.0, "go")
    with pytest.raises(ValueError, match="num_obs"):
        make_sample(config(sample_dt=1.0), [], track, 0.0, "go")


def test_masks_of_the_file_reach_the_sample(episode):
    with edited(episode) as file:
        mask = np.ones((12, 24, 32), bool)
        mask[:, :, :16] = False
        file["wrist/mask"] = mask
    sample = H5DatasetMapBase([episode], config(), train=False).sample(0, rng(), frame=0)
    assert sample.mask[0, 0].sum() == 24 * 32 and sample.mask[0, 1].sum() == 24 * 16


def test_scene_prefixes_are_dropped_where_asked(tmp_path):
    path = write_episode(tmp_path / "a.h5", prompts="LIVING_ROOM_SCENE2_put the milk in the basket")
    for strip, wanted in (
        (True, "put the milk in the basket"),
        (False, "LIVING_ROOM_SCENE2_put the milk in the basket"),
    ):
        sample = H5DatasetMapBase([path], config(strip_scene_prefix=strip), train=False).sample(0, rng(), frame=0)
        assert sample.prompt == wanted


def test_paraphrases_are_drawn_in_training_only(tmp_path):
    path = write_episode(tmp_path / "a.h5", prompts=["lift", "raise", "hoist"])
    training, evaluation = H5DatasetMapBase([path], config()), H5DatasetMapBase([path], config(), train=False)
    assert {training.sample(0, rng(s)).prompt for s in range(30)} == {"lift", "raise", "hoist"}
    assert {evaluation.sample(0, rng(s)).prompt for s in range(30)} == {"lift"}


def test_a_crop_moves_the_pixels_and_the_intrinsics_alike(tmp_path):
    """A white dot is found where the intrinsics say its ray goes, whatever the crop."""
    image, dot = np.zeros((256, 256, 3), np.uint8), (90, 170)  # row, column
    image[dot[0] - 3 : dot[0] + 4, dot[1] - 3 : dot[1] + 4] = 255
    K = np.array([[200.0, 0, 128], [0, 200.0, 128], [0, 0, 1]])
    ray = np.linalg.inv(K) @ (dot[1], dot[0], 1.0)
    frames = [{camera: CameraFrame(image, K, camera_pose(i)) for i, camera in enumerate(CAMERAS)}]
    track = StateTrack(np.array([0.0]), np.eye(4)[None, None], np.zeros((1, 1)))
    cropping = config(aug_crop=True, image_hw=(256, 256), sample_dt=1.0, shuffle_cameras=False)
    moved = 0
    for seed in range(20):
        sample = make_sample(cropping, frames, track, 0.0, "go", rng=rng(seed))
        rows, columns = np.nonzero(sample.rgb[0, 0, 0] > 100)
        pixel = sample.K[0] @ ray
        assert abs(columns.mean() - pixel[0]) < 0.6 and abs(rows.mean() - pixel[1]) < 0.6
        moved += not np.allclose(sample.K[0], K)
        np.testing.assert_array_equal(sample.K[1], K.astype(np.float32))  # the wrist camera is never cropped
    assert moved > 15


def test_augmentation_does_what_its_flags_say():
    off = draw_augmentation(config(), "front", rng())
    assert (off.crop, off.tone, off.color, off.blur_sigma, off.tint, off.patches) == (None, None, None, None, None, ())
    every = config(aug_crop=True, aug_color=True, aug_blur=True, aug_background=True)
    draws = [draw_augmentation(every, "front", rng(seed)) for seed in range(700)]
    assert all(0.95 <= draw.crop[0] <= 1 for draw in draws)
    assert 70 < sum(draw.blur_sigma is not None for draw in draws) < 130  # one in seven
    image = rng().integers(0, 256, (32, 48, 3), dtype=np.uint8)
    before = image.copy()
    for draw in draws[:20]:
        assert draw.recolor(image).shape == image.shape and draw.recolor(image).dtype == np.uint8
        top, left, height, width = draw.crop_window((100, 200))
        assert top >= 0 and left >= 0 and top + height <= 100 and left + width <= 200
    np.testing.assert_array_equal(image, before)


def test_neutral_colour_changes_are_the_identity():
    np.testing.assert_array_equal(tone_table(1.0, 1.0, 1.0), np.arange(256))
    np.testing.assert_array_equal(saturation_matrix(1.0), np.eye(3))
    grey = saturation_matrix(0.0) @ (10, 200, 30)
    assert np.ptp(grey) < 1e-4


def test_stage_0_of_a_large_set_reads_the_first_half(tmp_path):
    paths = [write_episode(tmp_path / f"{i}.h5", frames=2) for i in range(5)]

    class Large(H5DatasetMapBase):
        half_in_stage0 = True

    assert list(Large(reversed(paths), config(), train_stage=0).paths) == [str(path) for path in paths[:3]]
    assert len(Large(paths, config(), train_stage=1)) == len(H5DatasetMapBase(paths, config(), train_stage=0)) == 5


def test_faulty_episodes_are_left_out_and_remembered_when_a_dataset_is_opened(tmp_path):
    paths = [write_episode(tmp_path / f"{i}.h5", frames=2 + i) for i in range(3)]
    paths[1].write_bytes(paths[1].read_bytes()[:-100])
    dataset = H5DatasetMapBase(paths, config())
    assert [Path(path).name for path in dataset.paths] == ["0.h5", "2.h5"] and dataset.lengths.tolist() == [2, 4]
    assert [(Path(fault.path).name, fault.rule) for fault in dataset.faults] == [("1.h5", "file")]
    with pytest.raises(DataError, match=r"none of 1 episode.*1\.h5"):
        H5DatasetMapBase(paths[1:2], config())
    with pytest.raises(DataError, match="no episode"):
        H5DatasetMapBase([], config())


def test_a_dataset_takes_the_half_before_it_drops_faulty_episodes(tmp_path):
    paths = [write_episode(tmp_path / f"{i}.h5", frames=2) for i in range(4)]
    paths[0].write_bytes(b"")

    class Large(H5DatasetMapBase):
        half_in_stage0 = True

    assert list(Large(paths, config(), train_stage=0).paths) == [str(paths[1])]


def test_cameras_decoded_side_by_side_give_the_same_sample(episode):
    one, other = (H5DatasetMapBase([episode], config(num_obs=2), decode_threads=n) for n in (0, 3))
    for seed in range(20):
        for key, value in vars(one.sample(0, rng(seed))).items():
            np.testing.assert_array_equal(value, getattr(other.sample(0, rng(seed)), key))


def test_threads_may_read_one_episode_at_once(episode):
    with Episode(episode) as file, ThreadPoolExecutor(8) as threads:
        frames = np.arange(len(file)).repeat(20).tolist()
        seen = threads.map(lambda frame: file.rgb("front", frame)[0, 0, 0], frames)
        assert [round(int(value) / 10) for value in seen] == frames


def test_a_dataset_refuses_readers_it_does_not_know(episode):
    with pytest.raises(ValueError, match="video_reader.*decord"):
        H5DatasetMapBase([episode], config(), video_reader="vlc")


def test_a_file_that_was_checked_is_opened_on_trust_until_it_changes(tmp_path):
    path = write_episode(tmp_path / "a.h5", frames=6, desired=True)
    dataset, plain = (H5DatasetMapBase([path], config(), train=False) for _ in range(2))
    plain._open = lambda index: Episode(path, CAMERAS)
    assert dataset.episode(0)._trusted and not plain.episode(0)._trusted
    for key, value in vars(plain.sample(0, rng(), 3)).items():
        np.testing.assert_array_equal(value, getattr(dataset.sample(0, rng(), 3), key))
    changed = pickle.loads(pickle.dumps(dataset))  # as in another process
    dataset.episode(0).close()
    plain.episode(0).close()
    with h5py.File(path, "r+") as file:
        file["gripper"][...] = 3.0
        seal(file)
    with pytest.raises(DataError, match="openness") as caught:
        changed.sample(0, rng(), 3)
    assert caught.value.rule == "gripper"


def test_damage_that_leaves_size_and_time_alone_is_found_by_the_checksum(tmp_path):
    path = write_episode(tmp_path / "a.h5", frames=6)
    status = path.stat()
    dataset = H5DatasetMapBase([path], config(), train=False)
    with h5py.File(path, "r+") as file:
        file["front/K"][0, 0] = 31.0
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(DataError, match="not what was written"):
        dataset.sample(0, rng(), 3)


def test_open_files_are_bounded(tmp_path):
    paths = [write_episode(tmp_path / f"{i}.h5", frames=2) for i in range(4)]
    dataset = H5DatasetMapBase(paths, config())
    dataset.max_open_episodes = 2
    for index in (0, 1, 0, 2, 3, 0):
        dataset.sample(index, rng())
    assert list(dataset._open_episodes) == [3, 0]


def test_few_processes_keep_more_files_open_as_far_as_the_limit_of_files_goes(monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (20000, 20000))
    assert [kept_open(1, 0), kept_open(1, 8), kept_open(4, 2)] == [1024, 128, 128]
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (1024, 4096))
    assert kept_open(1, 0) == 512 and kept_open(2, 0) == 256


def test_every_dataset_of_the_table_is_registered_with_its_numbers():
    assert len(DATASETS) == 17
    for name, dataset in DATASETS.items():
        assert dataset.name == name
        values = dataset.config
        side, future = (128, 16) if name in ("Blocks", "LiberoSmall") else (256, 32)
        assert (values.image_hw, values.num_obs, values.num_history, values.num_future) == ((side, side), 1, 1, future)
        assert values.sample_camera_gaps == 4
    assert Droid.config.reference_cameras(0) == Droid.config.cameras and Droid.config.ee_offset_z == 0.15
    assert DATASETS["AgibotWorldAlpha"].config.reference_cameras(1) == ("head_cam", "right_cam")
    assert get_dataset_class("PickPlaceCan") is PickPlaceCan
    with pytest.raises(ValueError, match="unknown dataset class 'Liberox'.*LiberoSpatial"):
        get_dataset_class("Liberox")


def test_a_batch_pads_cameras_arms_and_prompts(tmp_path):
    one = H5DatasetMapBase([write_episode(tmp_path / "a.h5", prompts="go")], config(), train=False)
    three_cameras = ("front", "wrist", "top")
    both = H5DatasetMapBase(
        [write_episode(tmp_path / "b.h5", num_arms=2, cameras=three_cameras, prompts="go there")],
        config(cameras=three_cameras, ee_indices=(0, 1), ee_ref_cams=(("front",), ("top",))),
        train=False,
    )
    samples = [one.sample(0, rng(), 3), both.sample(0, rng(), 3)]
    samples[1].mask[:, 1] = False  # the second sample's wrist camera shows nothing
    batch = Collator(tokenize, pad_id=299, num_cameras=3, num_arms=2, pad_multiple=4)(samples)
    seen = batch.observation
    assert seen.camera_mask.tolist() == [[True, True, False], [True, False, True]]
    assert seen.image_index.tolist() == [0, 1, 3, 5]
    assert seen.valid_ee.tolist() == batch.gripper_mask.tolist() == [[True, False], [True, True]]
    assert seen.input_ids.shape == (2, 12) and seen.position_ids.shape == (3, 2, 12)
    assert seen.input_ids[0].tolist() == [299] * 8 + [300, 300, *b"go"]
    assert seen.attention_mask.sum(1).tolist() == [4, 10] and not seen.attention_mask[0, :8].any()
    assert seen.K[0, 2].tolist() == np.eye(3).tolist() and seen.world_from_cam[0, 0, 2].tolist() == np.eye(4).tolist()
    assert seen.world_from_ee[0, 1].tolist() == np.eye(4).tolist()
    assert batch.future.shape == (2, 4, 2, 17) and batch.future[0, 0, 1, :16].tolist() == np.eye(4).ravel().tolist()
    np.testing.assert_array_equal(batch.future[1].numpy(), samples[1].future)
    assert batch.source == [sample.source for sample in samples]


def test_a_batch_without_futures_can_be_made_for_serving(tmp_path):
    dataset = H5DatasetMapBase([write_episode(tmp_path / "a.h5")], config(), train=False)
    sample = dataset.sample(0, rng(), 3)
    sample.future = None
    batch = Collator(tokenize, 0, 2, 1)([sample])
    assert batch.future.shape == (1, 0, 1, 17) and batch.observation.history.shape == (1, 3, 1, 17)


def test_a_sample_too_large_for_the_batch_is_named(tmp_path):
    dataset = H5DatasetMapBase([write_episode(tmp_path / "a.h5")], config(), train=False)
    with pytest.raises(ValueError, match=r"a\.h5 frame 3 has 2 cameras"):
        Collator(tokenize, 0, 1, 1)([dataset.sample(0, rng(), 3)])


def test_importing_the_package_needs_no_data_and_no_network():
    code = (
        "import torch, socket\n"
        "def refuse(*a, **k): raise AssertionError('network was touched')\n"
        "socket.socket = refuse\n"
        "import data_utils.datasets, data_utils.batches.loader\n"
    )
    env = {"PYTHONPATH": str(ROOT), "APT_DATA_LOC": "/nowhere/at/all.yaml", "PATH": "/usr/bin:/bin"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr
