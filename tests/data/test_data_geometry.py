"""Times, poses and pixels: resampling, letterboxing, the recorded geometry."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from data_utils.geometry.letterbox import fit, norm_xy
from data_utils.geometry.resample import interpolate_poses, interpolate_values, nearest_index, so3_exp, so3_log

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "golden" / "geometry"


def check_golden(*arguments):
    command = [sys.executable, str(ROOT / "scripts" / "check_golden.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd="/")


def test_geometry_equals_the_recorded_numbers():
    from scripts.golden_geometry import check_geometry

    results = []
    check_geometry(GOLDEN, lambda name, error, tolerance: results.append((name, error, tolerance)))
    assert len(results) == 33
    assert [result for result in results if not result[1] <= result[2]] == []


def test_the_golden_check_fails_on_a_wrong_number_and_names_it(tmp_path):
    for file in GOLDEN.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    archive = dict(np.load(GOLDEN / "resample.npz"))
    archive["pose"][2, 0, 3] += 1e-3
    np.savez(tmp_path / "resample.npz", **archive)
    done = check_golden("--geometry", tmp_path)
    assert done.returncode == 1 and "FAIL  resample.pose" in done.stdout


def test_the_golden_check_names_what_is_missing(tmp_path):
    done = check_golden("--geometry", tmp_path / "nowhere")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "nowhere" in done.stderr
    done = check_golden("--geometry", tmp_path)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "resample.npz" in done.stderr


def random_poses(rng, *shape):
    poses = np.tile(np.eye(4), (*shape, 1, 1))
    poses[..., :3, :3] = Rotation.random(int(np.prod(shape)), random_state=rng).as_matrix().reshape(*shape, 3, 3)
    poses[..., :3, 3] = rng.normal(size=(*shape, 3))
    return poses


def test_times_outside_the_episode_clamp_to_its_ends():
    rng = np.random.default_rng(0)
    times, poses, values = np.arange(5.0), random_poses(rng, 5, 2), rng.uniform(size=(5, 2))
    query = np.array([-10.0, 0.0, 4.0, 99.0])
    np.testing.assert_array_equal(interpolate_poses(times, poses, query), poses[[0, 0, 4, 4]])
    np.testing.assert_array_equal(interpolate_values(times, values, query), values[[0, 0, 4, 4]])


def test_a_recorded_time_gives_the_recorded_pose_to_the_bit():
    rng = np.random.default_rng(1)
    times, poses = np.sort(rng.uniform(0, 9, 20)), random_poses(rng, 20, 1)
    np.testing.assert_array_equal(interpolate_poses(times, poses, times), poses)


def test_half_way_is_half_the_turn_about_the_same_axis():
    start, end = np.eye(4), np.eye(4)
    end[:3, :3] = Rotation.from_rotvec([0.0, 0.0, 1.0]).as_matrix()
    end[:3, 3] = (2.0, 0.0, 0.0)
    middle = interpolate_poses(np.array([0.0, 4.0]), np.stack([start, end]), np.array([2.0]))[0]
    np.testing.assert_allclose(so3_log(middle[:3, :3]), [0.0, 0.0, 0.5], atol=1e-12)
    np.testing.assert_allclose(middle[:3, 3], [1.0, 0.0, 0.0])


def test_two_frames_with_one_time_do_not_divide_by_zero():
    times = np.array([0.0, 1.0, 1.0, 2.0])
    values = interpolate_values(times, np.array([0.0, 1.0, 5.0, 6.0]), np.array([0.5, 1.0, 1.5]))
    np.testing.assert_array_equal(values, [0.5, 5.0, 5.5])


@given(st.lists(st.floats(-3, 3), min_size=3, max_size=3))
def test_log_undoes_exp_below_half_a_turn(vector):
    vector = np.array(vector)
    norm = np.linalg.norm(vector)
    vector = vector * min(1.0, 3.0 / norm) if norm else vector
    np.testing.assert_allclose(so3_log(so3_exp(vector)), vector, atol=1e-7)


@given(st.integers(0, 2**32 - 1))
def test_the_nearest_frame_is_the_nearest(seed):
    rng = np.random.default_rng(seed)
    times, query = np.sort(rng.uniform(0, 1, rng.integers(1, 9))), rng.uniform(-0.5, 1.5, 6)
    distance = np.abs(times[None] - query[:, None])
    picked = distance[np.arange(6), nearest_index(times, query)]
    np.testing.assert_array_equal(picked, distance.min(1))


@settings(max_examples=60, deadline=None)
@given(st.integers(8, 400), st.integers(8, 400), st.sampled_from([64, 128, 256]))
def test_letterboxed_pixels_see_along_the_same_rays(height, width, side):
    box = fit((height, width), (side, side))
    K = np.array([[1.2 * width, 0, width / 2], [0, 1.1 * width, height / 2], [0, 0, 1.0]])
    # A point of the scene lands, in the letterboxed image, where its old pixel was taken to.
    ray = np.array([0.1, -0.2, 1.0])
    old, new = K @ ray, box.intrinsics(K) @ ray
    taken = old[:2] * (box.size[1] / width, box.size[0] / height) + (box.offset[1], box.offset[0])
    np.testing.assert_allclose(new[:2], taken, atol=1e-9)
    assert box.mask().sum() == box.size[0] * box.size[1]
    assert max(box.size) <= side and side - max(box.size) <= 1


def test_borders_are_black_and_masked_out_but_keep_their_coordinates():
    box = fit((20, 40), (32, 32))
    image, mask = box.image(np.full((20, 40, 3), 255, np.uint8)), box.mask()
    assert mask.sum() == 16 * 32 and (image[~mask] == 0).all() and (image[mask] == 255).all()
    assert (norm_xy(np.diag([30.0, 30.0, 1.0]), (32, 32))[1] > 0).mean() > 0.9
    holes = np.ones((20, 40), bool)
    holes[:10] = False
    assert box.mask(holes).sum() == 8 * 32


def test_an_image_too_thin_to_fit_is_refused():
    with pytest.raises(ValueError, match="does not fit"):
        fit((1, 1000), (64, 64))
