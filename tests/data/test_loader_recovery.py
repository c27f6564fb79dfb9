"""Loading goes on: around episodes that cannot be read, and after workers that die or hang."""

import ctypes
import os
import signal
import time
from pathlib import Path

import pytest

from data_utils.batches import loader as loader_module
from data_utils.batches.loader import MAX_RESTARTS, build_loader
from data_utils.batches.mixture import Mixture
from data_utils.batches.options import LoaderOptions
from data_utils.batches.samplers import SampleKey
from data_utils.errors import DataError
from data_utils.samples.dataset import H5DatasetMapBase
from tests.data.episodes import config, tokenize, write_episode


@pytest.fixture(autouse=True)
def _soon(monkeypatch):
    monkeypatch.setattr(loader_module, "POLL_S", 1.0)


class Rigged(H5DatasetMapBase):
    """Episodes whose file name says what happens to the process that reads them."""

    def sample(self, index, rng, frame=None):
        name = os.path.basename(self.paths[index])
        if name.startswith("crash"):
            ctypes.string_at(0)
        if name.startswith("hang"):
            time.sleep(600)
        if name.startswith("kill"):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().sample(index, rng, frame)


def folder_of(path, *names):
    return [write_episode(path / name, frames=4) for name in names]


def loader_of(datasets, workers=2, timeout=60.0, tokenize=tokenize, **changes):
    options = {"batch_size": 2, "seed": 5, "multiplex": 10, "persistent_workers": True, **changes}
    options = LoaderOptions(workers=workers, timeout=timeout, **options)
    return build_loader(datasets, options, tokenize=tokenize, pad_id=0)[0]


def fingerprint(batches):
    return [(batch.source, batch.observation.rgb.numpy().tobytes()) for batch in batches]


def skipped(batches):
    return {(Path(entry.path).name, entry.rule, entry.blocked) for batch in batches for entry in batch.skipped}


@pytest.fixture
def damaged(tmp_path):
    """Three episodes, of which the second is damaged after the dataset was opened."""
    paths = folder_of(tmp_path, "0.h5", "1.h5", "2.h5")
    dataset = H5DatasetMapBase(paths, config())
    paths[1].write_bytes(b"not an episode any more")
    return dataset


def test_a_damaged_episode_is_replaced_and_named_in_the_sample(damaged):
    mixture = Mixture([damaged], seed=0)
    sample = mixture[SampleKey(0, 1, 0)]
    assert "1.h5" not in sample.source
    assert {(Path(entry.path).name, entry.rule, entry.blocked) for entry in sample.skipped} == {("1.h5", "file", False)}
    assert mixture[SampleKey(0, 1, 0)].source == sample.source
    assert mixture[SampleKey(0, 0, 0)].skipped == ()


def test_what_is_skipped_travels_with_the_batch_and_changes_no_other_sample(damaged):
    batches = list(loader_of([damaged]))
    assert len(batches) == 15 and skipped(batches) == {("1.h5", "file", False)}
    mixture = Mixture([damaged], seed=5)
    mixture.block_paths({damaged.paths[1]})  # never opened: the same replacements
    again = loader_of([damaged], workers=0)
    again.mixture.block_paths({damaged.paths[1]})
    blocked = list(again)
    assert fingerprint(blocked) == fingerprint(batches) and skipped(blocked) == {("1.h5", "file", True)}


def test_where_nothing_can_be_read_the_first_fault_is_one_line(damaged):
    Path(damaged.paths[0]).write_bytes(b"")
    Path(damaged.paths[2]).write_bytes(b"")
    for workers in (0, 2):
        with pytest.raises(DataError, match=r"^/.*[012]\.h5: .*other draws failed\)$"):
            list(loader_of([damaged], workers=workers))


def test_a_killed_worker_changes_nothing_in_the_batches(tmp_path, caplog):
    dataset = H5DatasetMapBase(folder_of(tmp_path, *(f"{i}.h5" for i in range(6))), config(aug_color=True))
    whole = fingerprint(loader_of([dataset], workers=0))
    loader = loader_of([dataset])
    seen = []
    for number, batch in enumerate(loader):
        seen.append(batch)
        if number in (3, 4, 11):
            os.kill(loader.worker_pids[number % 2], signal.SIGKILL)
    assert fingerprint(seen) == whole and 1 <= loader.restarts <= 3 and not skipped(seen)
    assert "SIGKILL" in caplog.text and "started again at batch" in caplog.text
    assert fingerprint(loader) == whole, "the next epoch starts where the sampler says"


def test_workers_killed_between_two_epochs_are_started_again(tmp_path):
    dataset = H5DatasetMapBase(folder_of(tmp_path, "0.h5", "1.h5", "2.h5"), config())
    loader = loader_of([dataset])
    first = fingerprint(loader)
    for pid in loader.worker_pids:
        os.kill(pid, signal.SIGKILL)
    assert fingerprint(loader) == first and loader.restarts == 1


def test_workers_that_are_slow_to_take_up_an_epoch_are_replaced(tmp_path):
    dataset = H5DatasetMapBase(folder_of(tmp_path, "0.h5", "1.h5", "2.h5"), config())
    loader = loader_of([dataset])
    first = fingerprint(loader)
    for pid in loader.worker_pids:
        os.kill(pid, signal.SIGSTOP)
    assert fingerprint(loader) == first and loader.restarts == 0


def test_a_file_that_crashes_its_reader_is_blocked_and_everything_else_stays(tmp_path, caplog):
    dataset = Rigged(folder_of(tmp_path, "0.h5", "1.h5", "2.h5", "crash.h5"), config())
    expected = loader_of([dataset], workers=0)
    expected.mixture.block_paths({dataset.paths[3]})
    loader = loader_of([dataset])
    batches = list(loader)
    assert fingerprint(batches) == fingerprint(expected) and skipped(batches) == {("crash.h5", "file", True)}
    assert loader.restarts == 1 and "SIGSEGV, reading" in caplog.text and "crash.h5" in caplog.text


def test_a_file_that_hangs_its_reader_is_blocked(tmp_path, caplog):
    dataset = Rigged(folder_of(tmp_path, "0.h5", "1.h5", "2.h5", "hang.h5"), config())
    loader = loader_of([dataset], timeout=2.0)
    batches = list(loader)
    assert len(batches) == 20 and skipped(batches) == {("hang.h5", "file", True)} and "hangs over" in caplog.text


def test_a_file_is_blamed_for_a_killed_worker_when_it_happens_twice(tmp_path):
    dataset = Rigged(folder_of(tmp_path, "0.h5", "1.h5", "2.h5", "kill.h5"), config())
    loader = loader_of([dataset])
    assert skipped(loader) == {("kill.h5", "file", True)} and 1 <= loader.restarts <= 2


def test_workers_that_keep_dying_stop_the_run_in_one_line(tmp_path):
    dataset = H5DatasetMapBase(folder_of(tmp_path, *(f"{i}.h5" for i in range(60))), config())
    loader = loader_of([dataset], workers=1, prefetch_factor=1)
    with pytest.raises(DataError, match=rf"lost {MAX_RESTARTS + 1} times.*--workers") as caught:
        for _ in loader:
            os.kill(loader.worker_pids[0], signal.SIGKILL)
    assert "\n" not in str(caught.value)


def test_an_error_in_the_code_is_not_taken_for_a_bad_file(tmp_path):
    dataset = H5DatasetMapBase(folder_of(tmp_path, "0.h5", "1.h5"), config())

    def broken(prompt, cameras):
        raise RuntimeError("a mistake")

    with pytest.raises(RuntimeError, match="a mistake"):
        list(loader_of([dataset], tokenize=broken))
