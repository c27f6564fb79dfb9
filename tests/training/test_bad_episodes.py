"""A run goes on around a few bad episodes and dead loader workers, and stops when the bad ones are many."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import time
from pathlib import Path

import h5py
import numpy as np
import pytest

from data_utils.batches.loader import build_loader
from data_utils.batches.options import LoaderOptions
from data_utils.datasets import PickPlaceCan
from data_utils.errors import DataError, UnusableEpisode
from data_utils.samples.dataset import H5DatasetMapBase
from tests.data.episodes import config, tokenize, write_episode
from tests.training.helpers import losses, start_training, train
from train_utils.backend import DDPBackend
from train_utils.bad_episodes import BadEpisodes


def spoil(path: Path) -> Path:
    """Replace every frame of a camera by something that is no JPEG."""
    with h5py.File(path, "r+") as file:
        frames = file["e2h_cam/rgb"]
        for index in range(len(frames)):
            frames[index] = np.frombuffer(b"not a jpeg", np.uint8)
    return path


def location_of(folder: Path) -> Path:
    path = folder.parent / "loc.yaml"
    path.write_text(f"default:\n  PickPlaceCan: {folder}\n")
    return path


def listed(folder: Path, name: str) -> list[dict]:
    lines = (folder / "ckpt" / name / "skipped_episodes.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture
def six(tmp_path, episode_dir) -> Path:
    """The six synthetic episodes, of which the third has frames that do not decode."""
    folder = tmp_path / "six"
    folder.mkdir()
    for path in episode_dir.glob("*.h5"):
        shutil.copy(path, folder)
    spoil(folder / "ep002.h5")
    return folder


def test_one_bad_episode_of_two_hundred_is_skipped_named_and_counted(tmp_path, episode_dir):
    folder = tmp_path / "many"
    folder.mkdir()
    for index in range(200):
        os.link(sorted(episode_dir.glob("*.h5"))[index % 6], folder / f"{index:03d}.h5")
    (folder / "077.h5").unlink()
    shutil.copy(episode_dir / "ep000.h5", folder / "077.h5")
    spoil(folder / "077.h5")
    dataset = PickPlaceCan(sorted(folder.iterdir()))
    options = LoaderOptions(batch_size=20, workers=1, multiplex=2)
    loader, _ = build_loader([dataset], options, tokenize=tokenize, pad_id=0)
    bad = BadEpisodes([dataset], 0.01, tmp_path / "run" / "list.jsonl", resume=False)
    for batch in loader:
        bad.add(batch.skipped)
        bad.exchange(Ranks([]))
    (entry,) = map(json.loads, bad.file.read_text().splitlines())
    assert Path(entry["path"]).name == "077.h5" and entry["rule"] in ("checksum", "image")
    assert entry["times"] == 2 and "e2h_cam/rgb" in entry["message"] and not entry["blocked"]


@pytest.mark.slow
def test_too_many_bad_episodes_stop_the_run_in_one_line_on_all_ranks(tmp_path, six):
    process = start_training(tmp_path, "run", location_of(six), processes=2, max_iterations=500, workers=1)
    _, err = process.communicate(timeout=120)
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert process.returncode != 0 and len(errors) == 1
    for text in ("1 of 6 episodes (16.7%)", "ep002.h5", "skipped_episodes.jsonl", "data_utils.inspect", "--max_bad_f"):
        assert text in errors[0]
    assert [Path(entry["path"]).name for entry in listed(tmp_path, "run")] == ["ep002.h5"]


def test_a_run_may_be_allowed_more(tmp_path, six, monkeypatch, capsys):
    monkeypatch.setenv("APT_DATA_LOC", str(location_of(six)))
    assert train(tmp_path, "run", max_iterations=3, max_bad_fraction=0.2, sample_multiplex=1) == 0
    assert listed(tmp_path, "run")[0]["times"] == 1 and "bad episodes 1" in capsys.readouterr().out


def test_faults_that_the_index_knows_stop_a_run_before_anything_is_built(tmp_path, six, monkeypatch, capsys):
    (six / "ep001.h5").write_bytes(b"")
    monkeypatch.setenv("APT_DATA_LOC", str(location_of(six)))
    assert train(tmp_path, "run", max_iterations=2) == 2
    out, err = capsys.readouterr()
    assert "1 of 6 episodes" in err and "ep001.h5" in err and "train:" not in out
    assert [entry["times"] for entry in listed(tmp_path, "run")] == [0]


@pytest.mark.slow
def test_killed_workers_leave_no_trace_in_the_losses(tmp_path, data_loc):
    # Further apart than workers read ahead: else two that end over the same episode rightly put it under suspicion.
    fields, steps = {"max_iterations": 16, "workers": 2, "prefetch_factor": 2}, (2, 8, 14)
    whole = start_training(tmp_path, "whole", data_loc, **fields)
    assert whole.wait(timeout=120) == 0
    process = start_training(tmp_path, "run", data_loc, **fields)
    killed = 0
    for line in process.stdout:
        if any(f" {step}/16 " in line for step in steps):
            kill_a_loader_worker(process.pid)
            killed += 1
    code, complaints = process.wait(timeout=120), process.stderr.read()
    assert code == 0 and killed == 3, complaints
    assert "SIGKILL" in complaints
    assert losses(tmp_path, "run") == losses(tmp_path, "whole") and len(losses(tmp_path, "run")) == 16


def kill_a_loader_worker(pid):
    """Waits for one to be there: workers may just be being replaced."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            # Reading of a process that has just ended fails; the file checker knows no torch.
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                if "torch" in Path(f"/proc/{child}/maps").read_text():
                    os.kill(int(child), signal.SIGKILL)
                    return
        time.sleep(0.02)
    raise AssertionError("the run has no loader worker")


def test_by_frame_and_with_decoding_threads_a_run_is_as_reproducible(tmp_path, located):
    common = {"sample_by": "frame", "decode_threads": 2, "log_interval": 1}
    assert train(tmp_path, "whole", max_iterations=4, **common) == 0
    assert train(tmp_path, "parts", max_iterations=2, **common) == 0
    assert train(tmp_path, "parts", max_iterations=4, resume=True, workers=1, **common) == 0
    assert losses(tmp_path, "parts") == losses(tmp_path, "whole")


def test_fields_that_make_no_sense_are_refused(tmp_path, located, capsys):
    for field, value, wanted in (
        ("sample_by", "video", "episode or frame"),
        ("max_bad_fraction", 2.0, "0 to 1"),
        ("video_reader", "vlc", "decord"),
        ("decode_threads", -1, "negative"),
    ):
        assert train(tmp_path, "run", **{field: value}) == 2
        assert wanted in capsys.readouterr().err


class Ranks(DDPBackend):
    """Two ranks, of which the other one says what it is told to."""

    def __init__(self, others: list) -> None:
        super().__init__("cpu")
        self.others = others

    def gather(self, items: list) -> list:
        return [*items, *self.others]


def test_ranks_share_what_they_skipped_and_a_resumed_run_knows_it(tmp_path):
    paths = [write_episode(tmp_path / f"{i}.h5", frames=2) for i in range(3)]
    datasets, file = [H5DatasetMapBase(paths, config())], tmp_path / "run" / "skipped.jsonl"
    bad = BadEpisodes(datasets, 0.9, file, resume=False)
    bad.add([UnusableEpisode(str(paths[0]), "image", "no JPEG")] * 2)
    blocked = UnusableEpisode(str(paths[1]), "file", "it ended a loader process", blocked=True)
    bad.exchange(Ranks([blocked]))
    assert len(bad) == 2 and bad.blocked == {str(paths[1])}
    again = BadEpisodes(datasets, 0.9, file, resume=True)
    assert len(again) == 2 and again.blocked == bad.blocked
    assert len(BadEpisodes(datasets, 0.9, file, resume=False)) == 0
    with pytest.raises(DataError, match=r"2 of 3 episodes \(66.7%\)"):
        BadEpisodes(datasets, 0.5, file, resume=True).exchange(Ranks([]))
    os.utime(paths[1], (time.time() + 5, time.time() + 5))  # repaired
    assert BadEpisodes(datasets, 0.9, file, resume=True).blocked == set()
