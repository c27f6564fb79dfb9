"""The planner shows the policy what training showed it, to the bit, whatever the dataset."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from apt.infer.planner import TrajPlanner
from data_utils.batches.collate import Collator
from data_utils.datasets import Droid, InternA1Lift2, LiberoSpatial
from data_utils.h5io import write_episode as write_episode_data
from data_utils.samples.dataset import H5DatasetMapBase
from tests.data.episodes import CAMERAS, config, edited, write_episode
from tests.data.test_video_episodes import episode_data, write_video
from tests.infer.helpers import frame_at, tiny_policy

RATES = {"Droid": 1 / 15, "InternA1Lift2": 1 / 10, "LiberoSpatial": 1.0}


def of_class(tmp_path, dataset_class) -> H5DatasetMapBase:
    """An episode with a known dataset's cameras, arms and clock."""
    rules = dataclasses.replace(dataset_class.config, image_hw=(64, 96))
    write_episode(
        tmp_path / "a.h5", 16, rules.num_arms, rules.cameras, (60, 80), RATES[dataset_class.name], prompts="A_SCENE1_go"
    )
    return dataset_class([tmp_path / "a.h5"], config=rules, train=False)


def with_history(tmp_path, num_arms=1, **changes) -> H5DatasetMapBase:
    write_episode(tmp_path / "a.h5", 16, num_arms, image_hw=(24, 40))
    return H5DatasetMapBase([tmp_path / "a.h5"], config(**changes), train=False)


def one_arm_of_two(tmp_path) -> H5DatasetMapBase:
    path = write_episode(tmp_path / "a.h5", 16, num_arms=2)
    with edited(path) as file:
        file.attrs["ee_indices"] = [1]
    return H5DatasetMapBase([path], config(ee_indices=(0, 1), ee_ref_cams=(CAMERAS, CAMERAS)), train=False)


def of_videos(tmp_path, **changes) -> H5DatasetMapBase:
    (tmp_path / "videos").mkdir()
    for number, camera in enumerate(CAMERAS):
        write_video(tmp_path / "videos" / f"{camera}.mp4", 24, number)
    write_episode_data(tmp_path / "a.h5", episode_data(frames=16, video_root="videos"))
    return H5DatasetMapBase([tmp_path / "a.h5"], config(**changes), train=False)


DATASETS = {
    "one arm, three cameras, a moved origin": lambda path: of_class(path, Droid),
    "two arms": lambda path: of_class(path, InternA1Lift2),
    "control steps, a scene in the prompt": lambda path: of_class(path, LiberoSpatial),
    "past states and images": lambda path: with_history(path, num_obs=2, sample_camera_gaps=2, record_dt=0.5),
    "past states between frames": lambda path: with_history(path, sample_dt=0.35),
    "one arm where two would fit": one_arm_of_two,
    "videos": lambda path: of_videos(path, num_obs=2, record_dt=0.1),
}


@pytest.fixture(scope="module", params=DATASETS)
def served_and_recorded(request, tmp_path_factory):
    """Observations of one moment: what the policy is asked with, and what the dataset gives for training."""
    dataset = DATASETS[request.param](tmp_path_factory.mktemp("episode"))
    rules = dataset.config
    policy = tiny_policy(num_history=rules.num_history, num_future=rules.num_future)
    planner = TrajPlanner.of_policy(policy, config=rules, steps=1)
    asked = []
    request = policy.request
    policy.request = lambda observation, *rest: asked.append(observation) or request(observation, *rest)

    now = 12
    recorded = dataset.sample(0, np.random.default_rng(0), now)
    planner.set_prompt(recorded.prompt)
    for frame in range(now + 1):
        planner.add_obs_frame(frame_at(dataset, 0, frame))
    assert planner.get_action() is not None
    tokenize = policy.prompt_tokenizer(rules.image_hw)
    collate = Collator(tokenize, tokenize.pad_id, rules.num_cameras, rules.num_arms)
    return asked[0], collate([recorded]).observation


def test_planner_and_dataset_give_the_same_observation_bit_for_bit(served_and_recorded):
    served, recorded = served_and_recorded
    for field in dataclasses.fields(recorded):
        one, other = getattr(served, field.name), getattr(recorded, field.name)
        if isinstance(one, torch.Tensor):
            assert one.dtype == other.dtype and torch.equal(one, other), field.name
        else:
            assert one == other, field.name
