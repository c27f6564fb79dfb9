"""Where a run's curves go: the real TensorBoard, wandb (offline) and Trackio (local), several at once, or none."""

from __future__ import annotations

import json
import sqlite3

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from apt.training import trackers
from apt.training.trackers import Trackers
from tests.training.helpers import losses, start_training, train

ALL = ("tensorboard", "wandb", "trackio")


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path, data_loc):
    monkeypatch.setenv("APT_DATA_LOC", str(data_loc))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))


def steps_of_trackio(folder) -> dict[str, list[int]]:
    """By run: the steps at which it has a loss."""
    with sqlite3.connect(folder / "trackio/apt.db") as base:
        rows = base.execute("select run_id, step, metrics from metrics order by id").fetchall()
    found: dict[str, list[int]] = {}
    for run, step, metrics in rows:
        if "loss/total" in json.loads(metrics):
            found.setdefault(run, []).append(step)
    return found


def test_every_tracker_gets_numbers_pictures_and_configuration_and_a_resumed_run_goes_on_as_the_same(tmp_path):
    given = {"report_to": ALL, "save_latest_interval": 2}
    assert train(tmp_path, "run", **given, vis_interval=2, max_iterations=2) == 0
    assert train(tmp_path, "run", **given, vis_interval=0, max_iterations=4, resume=True) == 0
    assert list(losses(tmp_path, "run")) == [1, 2, 3, 4]

    board = EventAccumulator(str(tmp_path / "log/run")).Reload()
    assert [event.step for event in board.Scalars("loss/total")] == [1, 2, 3, 4]
    assert {"trajectories", "gates"} <= set(board.Tags()["images"])

    offline = sorted((tmp_path / "log/run/wandb").glob("offline-run-*"))
    assert len(offline) == 2 and len({folder.name.rpartition("-")[2] for folder in offline}) == 1  # the same id
    written = [next(folder.glob("*.wandb")).read_bytes() for folder in offline]
    assert all(b"loss/total" in part and b"noise_samples_per_obs" in part for part in written)
    assert len(list(offline[0].glob("files/media/images/*.png"))) == 2

    assert list(steps_of_trackio(tmp_path).values()) == [[1, 2, 3, 4]]
    assert len(list((tmp_path / "trackio").rglob("*.png"))) == 2
    with sqlite3.connect(tmp_path / "trackio/apt.db") as base:
        assert json.loads(base.execute("select config from configs").fetchone()[0])["bs"] == 2


def test_without_trackers_the_table_is_still_written(tmp_path):
    assert train(tmp_path, "run", report_to=("none",), max_iterations=2) == 0
    assert list(losses(tmp_path, "run")) == [1, 2]
    assert [path.name for path in (tmp_path / "log/run").iterdir()] == ["metrics.jsonl"]


@pytest.mark.slow
def test_of_several_processes_one_reports(tmp_path, data_loc):
    process = start_training(tmp_path, "run", data_loc, processes=2, report_to=("trackio",), max_iterations=2)
    assert process.wait(300) == 0, process.stderr.read()
    assert list(steps_of_trackio(tmp_path).values()) == [[1, 2]]


@pytest.mark.parametrize(
    ("report_to", "says"),
    [
        (("mlflow",), "report_to is 'mlflow'; wanted tensorboard, wandb, trackio, none"),
        (("none", "wandb"), "report_to none goes with no other"),
    ],
)
def test_what_cannot_be_reported_to_is_refused(tmp_path, capsys, report_to, says):
    assert train(tmp_path, "run", report_to=report_to) == 2
    assert says in capsys.readouterr().err and not (tmp_path / "ckpt").exists()


def test_a_missing_package_ends_it_before_anything_is_made(tmp_path, capsys, monkeypatch):
    there = trackers.importlib.util.find_spec
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None if name == "trackio" else there(name))
    assert train(tmp_path, "run", report_to=("tensorboard", "trackio")) == 2
    assert "error: --report_to trackio: its package is missing; run: pip install trackio" in capsys.readouterr().err
    assert not (tmp_path / "ckpt").exists() and not (tmp_path / "log").exists()


def test_a_missing_key_ends_it_before_training_starts(tmp_path, data_loc, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))  # where a key would be
    process = start_training(tmp_path, "run", data_loc, report_to=("wandb",))  # wandb looks once per process
    said = process.communicate(timeout=120)[1].splitlines()[-1]
    assert process.returncode == 2
    assert said.startswith("error: --report_to wandb cannot be opened: ") and "key" in said.lower()
    assert not (tmp_path / "ckpt/run/ckpt_latest.pt").exists() and not (tmp_path / "log/run/metrics.jsonl").exists()


def test_a_tracker_that_fails_later_is_said_once_and_training_goes_on(tmp_path, monkeypatch, caplog):
    opened = Trackers.__init__

    def open_and_break(self, *arguments):
        opened(self, *arguments)
        self._open["trackio"]._run = None  # as where its service has gone

    monkeypatch.setattr(Trackers, "__init__", open_and_break)
    assert train(tmp_path, "run", report_to=("tensorboard", "trackio"), max_iterations=3) == 0
    said = [record.getMessage() for record in caplog.records if "has failed" in record.getMessage()]
    assert len(said) == 1 and said[0].startswith("trackio has failed and gets nothing more of this run: ")
    board = EventAccumulator(str(tmp_path / "log/run")).Reload()
    assert [event.step for event in board.Scalars("loss/total")] == [1, 2, 3]
