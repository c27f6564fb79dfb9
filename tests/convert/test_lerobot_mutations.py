"""A LeRobot source with anything changed in its columns, time stamps, K or texts is refused by a rule, or gives the
same samples."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_utils.convert.lerobot import LerobotConverter, LerobotSettings
from data_utils.errors import RULES, DataError
from data_utils.h5io import write_episode
from data_utils.samples.dataset import H5DatasetMapBase
from tests.convert import datasets
from tests.convert.test_lerobot_conversion import MAPPING, content
from tests.data.episodes import config

# Nothing is drawn at random but the instruction, of which there may be fewer.
CONFIG = config(
    cameras=("front", "hand"), wrist_cameras=("hand",), ee_ref_cams=(("front",),), num_future=2, shuffle_cameras=False
)
DATA = "data/chunk-000/episode_000000.parquet"
INSTRUCTIONS = ("push cup 0", "shove it, 0")
NUMBERS = ("state", "timestamp", "frame_index", "task_index", "episode_index")


class Source:
    """Columns, mapping and texts of one episode, to change as one likes."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.columns = pq.read_table(root / DATA).to_pydict()
        self.mapping = json.loads(json.dumps(MAPPING))
        self.tasks = [json.loads(line) for line in (root / "meta/tasks.jsonl").read_text().splitlines()]
        self.rows = [json.loads(line) for line in (root / "meta/episodes.jsonl").read_text().splitlines()]

    def write(self, folder: Path) -> Path:
        """The source as it is now, its videos those of the original; returns its mapping file."""
        (folder / DATA).parent.mkdir(parents=True)
        (folder / "meta").mkdir()
        pq.write_table(pa.table(self.columns), folder / DATA)
        shutil.copy(self.root / "meta/info.json", folder / "meta")
        for name, rows in (("tasks", self.tasks), ("episodes", self.rows)):
            (folder / f"meta/{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / "videos").symlink_to(self.root / "videos")
        (folder / "mapping.yaml").write_text(yaml.safe_dump(self.mapping))
        return folder / "mapping.yaml"


def samples(source: Source, folder: Path) -> list:
    mapping = source.write(folder)
    converter = LerobotConverter(LerobotSettings(folder, str(mapping)))
    job = next(job for job in converter.jobs() if job.name.endswith("000000"))
    write_episode(folder / "a.h5", converter.convert(job))
    dataset = H5DatasetMapBase([folder / "a.h5"], CONFIG)
    return [dataset.sample(0, np.random.default_rng(frame), frame) for frame in range(6)]


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return datasets.write_v21(tmp_path_factory.mktemp("source"), content(1))


@pytest.fixture(scope="module")
def unmutated(root, tmp_path_factory) -> list:
    return samples(Source(root), tmp_path_factory.mktemp("unmutated") / "in")


# -- changes: each takes a source, a name of a column, a row and a random generator ------------------------------------


def _entry(source: Source, column: str, row: int, value: object) -> None:
    values = list(source.columns[column])
    if isinstance(values[row], list):
        values[row] = [value, *values[row][1:]]
    else:
        values[row] = value
    source.columns[column] = values


def null(source, column, row, rng):
    source.columns[column] = [*source.columns[column][:row], None, *source.columns[column][row + 1 :]]


def not_a_number(source, column, row, rng):
    _entry(source, column, row, float(rng.choice([np.nan, np.inf, -np.inf])))


def ragged(source, column, row, rng):
    values = [value if isinstance(value, list) else [value] for value in source.columns[column]]
    values[row] = values[row][:-1] if rng.random() < 0.5 else [*values[row], 0.0]
    source.columns[column] = values


def twice(source, column, row, rng):
    for values in source.columns.values():
        values.insert(row, values[row])


def missing(source, column, row, rng):
    for values in source.columns.values():
        del values[row]


def shuffled(source, column, row, rng):
    order = rng.permutation(len(source.columns["state"]))
    source.columns = {name: [values[i] for i in order] for name, values in source.columns.items()}


def dropped(source, column, row, rng):
    del source.columns[column]


def as_text(source, column, row, rng):
    source.columns[column] = [str(value) for value in source.columns[column]]


def wider(source, column, row, rng):
    source.columns[column] = pa.array(source.columns[column], pa.list_(pa.float64()) if column == "state" else None)


def later(source, column, row, rng):
    shift = float(rng.choice([0.01, 0.04, 0.1, -0.03, 5.0]))
    source.columns["timestamp"] = [t + shift for t in source.columns["timestamp"]]


def another_clock(source, column, row, rng):
    rate = float(rng.choice([0.5, 0.97, 1.02, 2.0, 1000.0, 1e9]))
    source.columns["timestamp"] = [t * rate for t in source.columns["timestamp"]]


def jitter(source, column, row, rng):
    _entry(source, "timestamp", row, source.columns["timestamp"][row] + float(rng.choice([0.002, 0.05, -0.06, 0.2])))


def millimetres(source, column, row, rng):
    source.columns["state"] = [[1000 * v for v in row[:3]] + row[3:] for row in source.columns["state"]]


def another_gripper(source, column, row, rng):
    factor = float(rng.choice([100.0, 1000.0, -1.0, 850.0]))
    source.columns["state"] = [[*row[:7], factor * row[7]] for row in source.columns["state"]]


def other_sign(source, column, row, rng):  # the same rotation
    source.columns["state"][row] = [v if not 3 <= i < 7 else -v for i, v in enumerate(source.columns["state"][row])]


def longer_quaternion(source, column, row, rng):  # the same rotation
    source.columns["state"][row] = [v if not 3 <= i < 7 else 2 * v for i, v in enumerate(source.columns["state"][row])]


def no_quaternion(source, column, row, rng):
    source.columns["state"][row] = [v if not 3 <= i < 7 else 0.0 for i, v in enumerate(source.columns["state"][row])]


def another_k(source, column, row, rng):
    camera = source.mapping["cameras"][str(rng.choice(["front", "hand"]))]
    K = [
        [40, 0, 0, 0, 40, 0, 32, 24, 1], [80, 0, 64, 0, 80, 48, 0, 0, 2], [0.6, 0, 0.5, 0, 0.8, 0.5, 0, 0, 1],
        [40, 9, 32, 0, 40, 24, 0, 0, 1], [-40, 0, 32, 0, 40, 24, 0, 0, 1], [40, 0, 640, 0, 40, 24, 0, 0, 1],
        [40, 0, 32, 0, 40, 24, 0, 0, 0], [40, 0, float("nan"), 0, 40, 24, 0, 0, 1],
    ][int(rng.integers(8))]  # fmt: skip
    camera.pop("size", None), camera.update(K={"form": "matrix", "values": K})


def another_text(source, column, row, rng):
    text = [None, "", " \n", 7, ["push cup 0"], "x" * 5000, "push\u2028 cup\t0", " push cup 0 ", "a\x07b", float("nan")]
    source.tasks[0]["task"] = text[int(rng.integers(len(text)))]


def task_listed_twice(source, column, row, rng):
    source.tasks.append({"task_index": 0, "task": "push cup 0" if rng.random() < 0.5 else "lift cup 0"})


def another_length(source, column, row, rng):
    source.rows[0]["length"] = [None, 0, -1, 5, 7, "six", 6.5, float("nan")][int(rng.integers(8))]


def listed_twice(source, column, row, rng):
    source.rows.append(dict(source.rows[0]))


CHANGES = [
    null, not_a_number, ragged, twice, missing, shuffled, dropped, as_text, wider, later, another_clock, jitter,
    millimetres, another_gripper, other_sign, longer_quaternion, no_quaternion, another_k, another_text,
    task_listed_twice, another_length, listed_twice,
]  # fmt: skip


def assert_refused_or_same(root: Path, folder: Path, unmutated: list, change, column: str, row: int, seed: int) -> None:
    source = Source(root)
    change(source, column, row, np.random.default_rng(seed))
    try:
        made = samples(source, folder)
    except DataError as error:
        assert error.rule in RULES and "\n" not in str(error)
        return
    for ours, theirs in zip(made, unmutated, strict=True):
        for name, value in vars(theirs).items():
            if name in ("source", "prompt"):
                continue
            if isinstance(value, np.ndarray):
                np.testing.assert_allclose(getattr(ours, name), value, atol=1e-5, err_msg=name)
            else:
                assert getattr(ours, name) == value, name
        *words, subtask = ours.prompt.split()  # of the two instructions, where one is empty the other
        assert " ".join(words) in INSTRUCTIONS and subtask == theirs.prompt.split()[-1]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_each_kind_of_change_is_refused_or_changes_nothing(change, root, unmutated, tmp_path):
    for number, column in enumerate(NUMBERS if change in (null, not_a_number, ragged, dropped, as_text) else ["state"]):
        assert_refused_or_same(root, tmp_path / str(number), unmutated, change, column, 2, number)


@pytest.mark.slow
@settings(max_examples=500, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    change=st.sampled_from(CHANGES), column=st.sampled_from(NUMBERS), row=st.integers(0, 5), seed=st.integers(0, 999)
)
def test_five_hundred_changes_are_refused_or_change_nothing(root, unmutated, tmp_path, change, column, row, seed):
    folder = tmp_path / "in"
    shutil.rmtree(folder, ignore_errors=True)
    assert_refused_or_same(root, folder, unmutated, change, column, row, seed)
