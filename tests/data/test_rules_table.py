"""The document's table of rules: every rule is in it, with a message that it really gives."""

from __future__ import annotations

import re
from pathlib import Path

import h5py
import numpy as np
import pytest

from data_utils.checks.faults import find_faults
from data_utils.data_loc import find_episodes
from data_utils.errors import RULES, DataError
from data_utils.h5io import Episode
from tests.convert import datasets
from tests.convert.test_lerobot_conversion import convert, mapping_file
from tests.convert.test_lerobot_faults import change_data
from tests.convert.test_units_and_sources import scaled, with_state
from tests.data.episodes import edited, write_episode

DOC = Path(__file__).parents[2] / "docs/data.md"


def table() -> dict[str, str]:
    """Rule -> its example."""
    text = DOC.read_text(encoding="utf-8")
    rows = text[text.index("| rule | says |") :].split("\n\n")[0].splitlines()[2:]
    return {match[1]: match[2] for match in (re.fullmatch(r"\| `(\w+)` \| .+ \| `(.+)` \|", row) for row in rows)}


def change_attribute(name: str, value):
    def change(file: h5py.File) -> None:
        file.attrs[name] = value

    return change


def put(key: str, value):
    def change(file: h5py.File) -> None:
        del file[key]
        file[key] = value

    return change


def turned_over(file: h5py.File) -> None:
    file["front/pose"][:] = np.diag([1.0, 1.0, -1.0, 1.0])


def cut(file: h5py.File) -> None:
    file["front/rgb"][7] = file["front/rgb"][7][:-40]


CHANGES = {
    "version": change_attribute("schema_version", 9),
    "schema": put("front/K", np.zeros((2, 3))),
    "prompt": change_attribute("prompt_text", " "),
    "subtask": lambda file: _subtasks(file),
    "rotation": turned_over,
    "time": lambda file: file["timestamp"].__setitem__(4, 0.3),
    "intrinsics": lambda file: file["front/K"].__setitem__(..., np.transpose(file["front/K"][()])),
    "image": cut,
    "mask": lambda file: file.__setitem__("front/mask", np.ones((12, 24, 30), bool)),
}


def _subtasks(file: h5py.File) -> None:
    file["subtask_start_index"] = np.array([0, 3])
    file.create_dataset("subtask_description", data=["reach", " "], dtype=h5py.string_dtype())


def messages(rule: str, tmp_path: Path) -> list[str]:
    path = write_episode(tmp_path / "a.h5")
    if rule == "location":
        with pytest.raises(DataError) as caught:
            find_episodes(tmp_path / "demos", "record some first")
        return [str(caught.value)]
    if rule == "file":
        path.write_bytes(path.read_bytes()[:900])
        return [fault.message for fault in find_faults(path)]
    if rule == "checksum":
        with h5py.File(path, "r+") as file:
            file["front/pose"][0, 3] = 5.0
        return [fault.message for fault in find_faults(path)]
    if rule == "arms":
        return [fault.message for fault in find_faults(path, ee_indices=(0, 1))]
    if rule == "camera":
        with pytest.raises(DataError) as caught:
            Episode(path, ("front", "top"))
        return [str(caught.value)]
    if rule in ("pose", "gripper", "video"):
        columns = {"pose": slice(0, 3), "gripper": slice(7, 8), "video": slice(0, 0)}[rule]
        source = datasets.write_v21(tmp_path / "in", with_state(scaled(columns, 1000)))
        if rule == "video":
            change_data(source, lambda columns: columns.update(timestamp=[1.1 * t for t in columns["timestamp"]]))
        return [failure.message for failure in convert(source, tmp_path / "out", mapping_file(tmp_path)).failed]
    with edited(path) as file:
        CHANGES[rule](file)
    return [fault.message for fault in find_faults(path)]


@pytest.mark.parametrize("rule", RULES)
def test_the_example_of_every_rule_is_what_it_says(rule, tmp_path):
    example = table()[rule]
    said = messages(rule, tmp_path)
    pattern = ".*".join(re.escape(part) for part in example.split("..."))
    assert any(re.search(pattern, message) for message in said), (example, said)
