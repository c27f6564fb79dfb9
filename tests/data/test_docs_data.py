"""docs/data.md does what it says: its code is run as it stands."""

import dataclasses
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from data_utils.config import DataConfig
from data_utils.datasets import get_dataset_class
from data_utils.errors import RULES
from data_utils.h5io import Episode
from tests.data.episodes import poses

DOCS = Path(__file__).resolve().parents[2] / "docs" / "data.md"


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.S)


class Robot:
    """What the document calls ``robot``: yours."""

    world_from_head, ee_from_hand = np.eye(4), np.eye(4)
    head_K = hand_K = np.array([[60.0, 0.0, 32.0], [0.0, 60.0, 24.0], [0.0, 0.0, 1.0]])

    def __init__(self):
        self.frame = 0

    def read(self):
        self.frame += 1
        image = np.full((48, 64, 3), self.frame, np.uint8)
        return SimpleNamespace(
            time=self.frame / 10,
            world_from_base=np.eye(4),
            base_from_ee=poses(np.array([self.frame / 10]))[0, 0],
            gripper_width=0.04,
            head_rgb=image,
            hand_rgb=image,
        )

    def wait_for_next_frame(self):
        pass


def test_twenty_lines_bring_a_robots_recording_into_training(tmp_path):
    (recorder,), (dataset, *_) = blocks("python"), blocks("yaml")
    assert len([line for line in recorder.splitlines() if line.strip()]) <= 20
    names = {}
    exec(recorder, names)
    names["record"](Robot(), tmp_path / "a.h5", "put the cup on the tray", seconds=2)
    with Episode(tmp_path / "a.h5") as episode:
        assert len(episode) == 20 and episode.gripper[0] == 0.5

    (tmp_path / "my_robot.yaml").write_text(dataset)
    sample = get_dataset_class(str(tmp_path / "my_robot.yaml"))().sample(0, np.random.default_rng(0))
    assert sample.prompt == "put the cup on the tray" and sample.future.shape == (32, 1, 17)


def test_every_field_of_a_dataset_is_in_the_table():
    rows = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \| ", DOCS.read_text(encoding="utf-8"), re.M)
    named = {name for row in rows for name in re.findall(r"\w+", row)}
    assert {field.name for field in dataclasses.fields(DataConfig)} <= named


def test_every_rule_of_the_messages_is_explained():
    text = DOCS.read_text(encoding="utf-8")
    assert [rule for rule in RULES if rule != "location" and f"`{rule}`" not in text] == []
