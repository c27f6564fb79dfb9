"""Colours changed on the device are those the CPU would have made."""

import numpy as np
import pytest
import torch

from data_utils.batches.collate import Collator
from data_utils.samples.dataset import H5DatasetMapBase
from data_utils.samples.device_augment import recolored
from tests.data.episodes import config, tokenize, write_episode

EVERYTHING = dict(aug_crop=True, aug_color=True, aug_blur=True, aug_background=True, num_obs=2, image_hw=(40, 32))


@pytest.fixture(scope="module")
def episode(tmp_path_factory):
    return write_episode(tmp_path_factory.mktemp("episode") / "a.h5", image_hw=(36, 48))


def batches(episode, count, **changes):
    """The same samples with colours changed by the workers, and left to the device."""
    collate = Collator(tokenize, 0, num_cameras=3, num_arms=1)
    rules = config(**{**EVERYTHING, **changes})
    for defer in (False, True):
        dataset = H5DatasetMapBase([episode], rules, defer_color=defer)
        yield collate([dataset.sample(0, np.random.default_rng(seed)) for seed in range(count)])


def difference(episode, count=24, device="cpu", **changes):
    made, deferred = batches(episode, count, **changes)
    done = recolored(deferred.to(device))
    assert deferred.color is not None and done.color is None
    assert not torch.equal(deferred.observation.rgb, made.observation.rgb)
    return (done.observation.rgb.cpu().int() - made.observation.rgb.int()).abs()


def test_patches_tint_tone_and_saturation_on_the_device_equal_the_workers(episode):
    assert difference(episode, aug_blur=False).max() <= 1


def test_blur_on_the_device_equals_the_workers_to_rounding(episode):
    error = difference(episode, count=48)
    assert error.max() <= 2 and error.float().mean() < 0.1


def test_borders_and_padded_cameras_stay_black(episode):
    _, deferred = batches(episode, 16)
    done = recolored(deferred).observation
    shown = done.mask[:, :, :, None].expand_as(done.rgb)
    assert done.rgb[~shown].max() == 0 and done.rgb[shown].float().mean() > 20


def test_geometry_prompts_and_draws_do_not_depend_on_where_colours_change(episode):
    made, deferred = batches(episode, 8)
    for name in ("mask", "K", "world_from_cam", "world_from_ref", "history", "input_ids"):
        assert torch.equal(getattr(made.observation, name), getattr(deferred.observation, name)), name


def test_nothing_is_deferred_without_training(episode):
    dataset = H5DatasetMapBase([episode], config(**EVERYTHING), train=False, defer_color=True)
    assert dataset.sample(0, np.random.default_rng(0)).color is None


@pytest.mark.gpu
def test_a_gpu_makes_the_same_colours(episode):
    assert difference(episode, device="cuda").max() <= 2
