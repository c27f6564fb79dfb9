"""YAML files that people write: what is wrong is said with file and line."""

from __future__ import annotations

import pytest

from data_utils.convert.mapping import PRESETS, MappingError, load_mapping
from data_utils.data_loc import LOCATION_VARIABLE, locate
from data_utils.errors import DataError
from data_utils.yaml_file import read_yaml
from examples.blocks.world import WORLD_FILE, load_world


def write(tmp_path, text: str | bytes):
    path = tmp_path / "file.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


@pytest.mark.parametrize("text, complaint", [
    ("a: 1\nb: 2\na: 3\n", r"file.yaml, line 3: is not valid YAML \('a' is there twice\)"),
    ("a:\n  - {c: 1, c: 2}\n", "line 2: .*'c' is there twice"),
    ("a: [1, 2\nb: 3\n", "line 2: is not valid YAML"),
    ("a: \t- b\n", "line 1: is not valid YAML"),
    ("a: 1\n---\nb: 2\n", "line 2: is not valid YAML"),
    (b"a: \xff\n", "byte 3 is no UTF-8"),
    ("a: 2001-13-45\n", "is not valid YAML"),
    ("a: !!python/name:os.system x\n", "line 1: is not valid YAML"),
])  # fmt: skip
def test_what_is_no_yaml_or_says_something_twice_is_refused_with_its_line(tmp_path, text, complaint):
    with pytest.raises(ValueError, match=complaint) as caught:
        read_yaml(write(tmp_path, text))
    assert "\n" not in str(caught.value)


def test_everything_has_a_line_and_what_is_missing_has_that_of_what_it_lies_in(tmp_path):
    file = read_yaml(write(tmp_path, "a: &x\n  b: [1,\n    {c: 2}]\nd:\n  <<: *x\n  b: 3\n"))
    assert file.value == {"a": {"b": [1, {"c": 2}]}, "d": {"b": 3}}
    lines = {"a": 1, "a.b": 2, "a.b[1].c": 3, "a.b[1].nothing": 3, "d.b": 6, "d.nothing.here": 4}
    assert {where: int(file.at(where).rpartition(" ")[2]) for where in lines} == lines
    assert read_yaml(write(tmp_path, "")).value is None


def test_a_mapping_a_world_and_a_location_file_are_refused_with_the_line(tmp_path, monkeypatch):
    preset = (PRESETS / "droid.yaml").read_text()
    wrong = write(tmp_path, preset.replace("cameras:", "camera_s:"))
    line = preset.split("cameras:")[0].count("\n") + 1
    with pytest.raises(MappingError, match=f"file.yaml, line {line}: has unknown field 'camera_s'"):
        load_mapping(wrong)

    world = WORLD_FILE.read_text()
    line = world.split("confusable:")[0].count("\n") + 1
    with pytest.raises(ValueError, match=f"file.yaml, line {line}: confusable: is 'often'; wanted a finite number"):
        load_world(write(tmp_path, world.replace("confusable: 0.5", "confusable: often")))

    monkeypatch.setenv(LOCATION_VARIABLE, str(write(tmp_path, "# mine\nBlocks: /data/blocks\n")))
    with pytest.raises(
        DataError, match="line 2: block 'Blocks' is not a mapping .*'Blocks: /data/blocks' go below 'default:'"
    ):
        locate("Blocks")
