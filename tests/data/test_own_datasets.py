"""A robot of one's own, without a change to the library: a class elsewhere, or a YAML file beside the episodes."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle

import numpy as np
import pytest

from apt.configs import TrainConfig, train_config_from_dict
from apt.presets import CONFIGS
from data_utils.data_loc import Location
from data_utils.datasets import DATASETS, Blocks, dataset_class_or_plain, get_dataset_class
from data_utils.errors import DataError
from data_utils.samples.dataset import H5DatasetMapBase
from tests.data.episodes import write_episode
from train_utils.errors import ConfigError

ROBOT = """\
cameras: [front, wrist]
wrist_cameras: [wrist]
sample_dt: 0.1
num_future: 8
image_hw: [64, 64]
"""


@pytest.fixture
def robot(tmp_path):
    folder = tmp_path / "my robot"
    folder.mkdir()
    (folder / "robot.yaml").write_text(ROBOT)
    for number in range(3):
        write_episode(folder / f"{number}.h5", frames=6)
    return folder / "robot.yaml"


def test_a_yaml_file_beside_the_episodes_is_a_dataset(robot):
    found = get_dataset_class(str(robot))
    assert (found.name, found.config.num_future, found.config.image_hw) == ("robot", 8, (64, 64))
    assert found is get_dataset_class(str(robot)) and issubclass(found, H5DatasetMapBase)
    dataset = found()
    assert len(dataset) == 3 and dataset.sample(0, np.random.default_rng(0)).future.shape[0] == 8
    assert pickle.loads(pickle.dumps(dataset)).config == dataset.config  # as it goes to workers
    config = TrainConfig(dataset_classes=(str(robot),))
    assert config.vla_config().num_future == 8


def test_it_may_say_another_name_and_place_and_is_read_anew_when_it_changes(robot):
    get_dataset_class(str(robot))
    elsewhere = robot.parent / "sub"
    elsewhere.mkdir()
    write_episode(elsewhere / "a.h5", frames=4)
    robot.write_text(ROBOT + "name: Mine\nepisodes: sub\n")
    os.utime(robot, ns=(1, 1))
    found = get_dataset_class(str(robot))
    assert found.name == "Mine" and found.locations() == [Location(str(elsewhere))] and len(found()) == 1
    robot.write_text(ROBOT + "episodes: nowhere\n")
    os.utime(robot, ns=(2, 2))
    with pytest.raises(DataError, match="nowhere .from .*robot.yaml, line 6. matches no episode files"):
        get_dataset_class(str(robot))()


@pytest.mark.parametrize("change, complaint", [
    ("sample_dt: fast\n", "robot.yaml, line 3: sample_dt: is 'fast'; wanted a finite number"),
    ("camera_names: [a]\n", "robot.yaml, line 3: has unknown field 'camera_names'"),
    ("image_hw: [64]\n", "robot.yaml, line 3: image_hw: .* wanted a list of 2"),
    ("num_obs: 0\n", "num_obs is 0; it must be at least 1"),
    ("name: [a]\n", "robot.yaml, line 3: name is"),
    ("cameras: [b]\n", "robot.yaml, line 3: is not valid YAML .'cameras' is there twice"),
])  # fmt: skip
def test_a_wrong_one_is_refused_with_its_line_before_anything_is_built(robot, change, complaint):
    robot.write_text("cameras: [front, wrist]\nwrist_cameras: [wrist]\n" + change)
    with pytest.raises(ConfigError, match=complaint) as caught:
        TrainConfig(dataset_classes=(str(robot),))
    assert "\n" not in str(caught.value)


def test_a_class_elsewhere_is_named_by_its_module(tmp_path, monkeypatch):
    (tmp_path / "my_robots.py").write_text(
        "from data_utils.config import DataConfig\nfrom data_utils.samples.dataset import H5DatasetMapBase\n\n\n"
        "class Arm(H5DatasetMapBase):\n    config = DataConfig(cameras=('front',), num_future=4)\n\n\nnumber = 5\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert TrainConfig(dataset_classes=("my_robots:Arm",)).vla_config().num_future == 4
    for name, complaint in (
        ("my_robots:Leg", "my_robots:Leg: module 'my_robots' has no attribute 'Leg'"),
        ("my_robots:number", "is no class with a config"),
        ("no_such_module:Arm", "No module named 'no_such_module'"),
        ("Arm", "unknown dataset class 'Arm'; known: .* or package.module:Class, or a YAML file"),
        ("arm.yaml", "there is no dataset file /.*arm.yaml"),
    ):
        with pytest.raises(ValueError, match=complaint):
            get_dataset_class(name)
    assert dataset_class_or_plain("my_robots:Leg") is H5DatasetMapBase


def test_a_run_keeps_the_sampling_rules_of_its_data_whatever_becomes_of_their_class(monkeypatch):
    saved = json.loads(json.dumps(CONFIGS["blocks"].to_dict()))
    trained, unknown = train_config_from_dict(saved)
    assert not unknown and trained.data_configs() == CONFIGS["blocks"].data_configs() and not trained.changed_rules()

    monkeypatch.setattr(Blocks, "config", dataclasses.replace(Blocks.config, sample_dt=0.5, num_future=4))
    trained, _ = train_config_from_dict(saved)
    assert trained.vla_config().num_future == 16
    assert trained.changed_rules() == [
        f"Blocks: sample_dt {trained.data['Blocks'].sample_dt}, today 0.5", "Blocks: num_future 16, today 4"
    ]  # fmt: skip

    monkeypatch.delitem(DATASETS, "Blocks")
    trained, _ = train_config_from_dict(saved)
    assert trained.data_configs() == [trained.data["Blocks"]]
    with pytest.raises(ConfigError, match="unknown dataset class 'Blocks'"):
        train_config_from_dict({name: value for name, value in saved.items() if name != "data"})
    with pytest.raises(ConfigError, match="data in the run's JSON is of no use: unknown DataConfig field.s. wheels"):
        train_config_from_dict({**saved, "data": {"Blocks": {**saved["data"]["Blocks"], "wheels": 3}}})
