"""Runs of two processes that are stopped, killed or fed with nonsense: what they say and leave, how they go on."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import time

import h5py
import pytest
import torch

from apt.checkpoint import load_checkpoint
from data_utils.h5io import seal
from tests.training.helpers import REPOSITORY, losses, start_training, train
from tests.training.processes import launched, printed_command, ranks_of, run_printed, start_script, wait_for
from train_utils.errors import DiskFullError
from train_utils.saving import save_checkpoint


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_two_ranks_that_are_told_to_stop_save_and_the_printed_line_goes_on(tmp_path, data_loc, number):
    process = start_script(tmp_path, data_loc, "--max-iter", "9999", "--va-name", "va", "--vla-name", "vla")
    wait_for(process, " 7/9999 ")
    process.send_signal(number)
    for pid in ranks_of(process).values():  # as a job manager does, which tells every process of a job
        os.kill(pid, signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and not err, err
    saved = load_checkpoint(tmp_path / "a b/ckpt/va/ckpt_latest.pt")["current_iters"]
    assert f"at iteration {saved}, saved; resume with: APT_DATA_LOC=" in out and "stage 1" not in out
    command = printed_command(out)
    assert command.endswith("--stage both --va-conti va --vla-name vla")
    again = run_printed(command, "--max-iter", str(saved + 2))
    assert again.returncode == 0, again.stderr
    assert f"resume: va at iteration {saved}" in again.stdout and again.stdout.count("done:") == 2


@pytest.mark.slow
@pytest.mark.parametrize("number, ranks", [(signal.SIGTERM, 0), (signal.SIGINT, 2)])
def test_a_run_that_is_told_to_stop_before_its_first_step_ends_and_says_how_to_start_it(
    tmp_path, data_loc, number, ranks
):
    process = start_script(tmp_path, data_loc, "--stage", "0", "--va-name", "va", "--max-iter", "1")
    deadline = time.monotonic() + 60
    while len(ranks_of(process)) < ranks or not launched(process):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and not err, err
    told = "Ctrl-C (SIGINT): stopping; again: without saving" if number == signal.SIGINT else "SIGTERM: stopping"
    assert told in out.splitlines()
    assert "[stage 0] stopped before the first step; start again with: APT_DATA_LOC=" in out
    assert not (tmp_path / "a b/ckpt/va/ckpt_latest.pt").exists()
    again = run_printed(printed_command(out))
    assert again.returncode == 0 and "done:" in again.stdout, again.stderr


@pytest.mark.slow
def test_a_killed_rank_ends_the_job_at_once_and_the_printed_line_goes_on(tmp_path, data_loc):
    process = start_script(tmp_path, data_loc, "--stage", "0", "--va-name", "va", "--max-iter", "9999")
    wait_for(process, " 8/9999 ")
    began = time.monotonic()
    os.kill(ranks_of(process)[1], signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1 and time.monotonic() - began < 45
    lines = err.strip().splitlines()
    assert len(lines) == 2 and re.match(r"error: rank 1 \(process \d+\) was ended by SIGKILL", lines[0]), err
    saved = load_checkpoint(tmp_path / "a b/ckpt/va/ckpt_latest.pt")["current_iters"]
    again = run_printed(printed_command(lines[1]), "--max-iter", str(saved + 1))
    assert again.returncode == 0 and f"resume: va at iteration {saved}" in again.stdout, again.stderr


@pytest.mark.slow
def test_the_traceback_of_the_rank_that_failed_is_the_only_one_and_comes_first(tmp_path, data_loc):
    breaks = tmp_path / "sitecustomize.py"
    breaks.write_text(
        "import os\n"
        "if os.environ.get('RANK') == '1':\n"
        "    import train_utils.metrics as metrics\n"
        "    def add(self, values): raise KeyError('broken on purpose')\n"
        "    metrics.MetricWindow.add = add\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{tmp_path}:{REPOSITORY}")
        process = start_training(tmp_path, "run", data_loc, processes=2, max_iterations=9999)
        _, err = process.communicate(timeout=90)
    assert process.returncode == 1
    assert err.startswith("Traceback") and err.count("Traceback") == 1 and "KeyError: 'broken on purpose'" in err
    assert err.strip().splitlines()[-1] == "error: rank 1 failed with the traceback above; the others were stopped"


@pytest.mark.slow
def test_ranks_killed_during_a_save_leave_a_checkpoint_to_resume_from(tmp_path, data_loc):
    process = start_script(
        tmp_path, data_loc, "--stage", "0", "--va-name", "va", "--max-iter", "9999", "--save_latest_interval", "1"
    )
    wait_for(process, " 3/9999 ")
    folder = tmp_path / "a b/ckpt/va"
    deadline = time.monotonic() + 30
    while not list(folder.glob(".*.writing")) and time.monotonic() < deadline:
        pass
    for pid in ranks_of(process).values():
        os.kill(pid, signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1 and list(folder.glob(".*.writing")), "it was killed in the middle of a save"
    saved = load_checkpoint(folder / "ckpt_latest.pt")["current_iters"]
    again = run_printed(printed_command(err), "--max-iter", str(saved + 1))
    assert again.returncode == 0 and f"resume: va at iteration {saved}" in again.stdout, again.stderr
    assert not list(folder.glob(".*.writing"))


@pytest.mark.slow
def test_a_loss_that_is_not_finite_on_one_rank_is_skipped_by_all_and_its_file_named(tmp_path, episode_dir):
    folder = tmp_path / "episodes"
    folder.mkdir()
    for path in sorted(episode_dir.glob("*.h5")):
        (folder / path.name).write_bytes(path.read_bytes())
    with h5py.File(folder / "ep003.h5", "r+") as file:
        for camera in ("e2h_cam", "eih_cam"):
            file[camera]["pose"][:, 0, 3] = 3e38  # a camera so far away that coordinates in it overflow
        seal(file)
    location = tmp_path / "loc.yaml"
    location.write_text(f"default:\n  PickPlaceCan: {folder}\n")
    process = start_training(tmp_path, "run", location, processes=2, max_iterations=12, bs=1, sample_multiplex=10)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    named = set(re.findall(r"ep\d+\.h5", " ".join(line for line in out.splitlines() if "warning" in line)))
    assert named == {"ep003.h5"}
    assert re.search(r" skipped [1-9]", out)
    weights = load_checkpoint(tmp_path / "ckpt/run/ckpt_latest.pt")["weights"]
    assert all(tensor.isfinite().all() for tensor in weights.values()) and len(losses(tmp_path, "run")) == 12


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a file system of its own, of 70 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    options = ["mount", "-t", "tmpfs", "-o", "size=70m", "none", str(folder)]
    if subprocess.run(options, capture_output=True).returncode:
        pytest.skip("mounting a small file system takes root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_disk_that_fills_up_keeps_the_old_checkpoint_and_stops_the_run_in_one_line(
    tmp_path, small_disk, located, capsys
):
    assert train(tmp_path, "run", max_iterations=1, ckpt_dir=small_disk) == 0  # two files of 27 MiB
    before = (small_disk / "run/ckpt_latest.pt").read_bytes()
    capsys.readouterr()
    assert train(tmp_path, "run", max_iterations=3, ckpt_dir=small_disk, resume=True) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert re.match(r"error: the disk is full: ckpt_latest.pt needs \d\d.\d MiB and \d+.\d MiB are free in ", line)
    assert "is kept as it was; make room, then resume" in line
    assert (small_disk / "run/ckpt_latest.pt").read_bytes() == before
    assert not list((small_disk / "run").glob(".*"))


def test_a_disk_that_another_program_fills_during_a_save_is_no_different(small_disk, monkeypatch):
    path = small_disk / "ckpt_latest.pt"
    save_checkpoint({"weights": {"w": torch.ones(1_000_000)}}, path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: shutil._ntuple_diskusage(2**40, 0, 2**40))
    with pytest.raises(DiskFullError, match="ckpt_latest.pt needs 76.3 MiB"):
        save_checkpoint({"weights": {"w": torch.zeros(20_000_000)}}, path)
    assert load_checkpoint(path)["weights"]["w"].sum() == 1_000_000 and len(list(small_disk.iterdir())) == 1


@pytest.mark.slow
def test_a_full_disk_stops_two_ranks_in_one_line_and_the_printed_line_goes_on(tmp_path, small_disk, data_loc):
    process = start_script(
        tmp_path, data_loc, "--stage", "0", "--va-name", "va", "--max-iter", "9999", "--save_latest_interval", "3",
        ckpt_dir=small_disk,
    )  # fmt: skip
    wait_for(process, " 4/9999 ")
    filler = small_disk / "filler"
    filler.write_bytes(bytes(shutil.disk_usage(small_disk).free - 2**20))
    _, err = process.communicate(timeout=90)
    assert process.returncode == 1
    full, resume = err.strip().splitlines()
    assert full.startswith("error: the disk is full: ckpt_latest.pt needs")
    saved = load_checkpoint(small_disk / "va/ckpt_latest.pt")["current_iters"]
    assert saved in (3, 6), "6 where the run was quicker than the filler"
    filler.unlink()
    again = run_printed(printed_command(resume), "--max-iter", str(saved + 4))
    assert again.returncode == 0 and f"resume: va at iteration {saved}" in again.stdout, again.stderr
    assert load_checkpoint(small_disk / "va/ckpt_latest.pt")["current_iters"] == saved + 4
