"""Jobs of several machines, one of which goes away, and launchers that are killed. Each launcher here is a machine."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from pathlib import Path

import pytest
from torch.distributed import TCPStore

from apt.checkpoint import load_checkpoint
from tests.training.processes import free_port, printed_command, run_printed, start_script, wait_for
from train_utils.failures import FAILED, LOST_PEER
from train_utils.heartbeat import Heartbeat


def family(pid: int) -> list[int]:
    """A process and all below it."""
    children = " ".join(task.read_text() for task in Path(f"/proc/{pid}/task").glob("*/children")).split()
    return [pid, *(member for child in children for member in family(int(child)))]


def send(number: int, pids: list[int]) -> None:
    for pid in pids:
        os.kill(pid, number)


def test_a_machine_that_falls_silent_is_missed_and_one_that_was_never_there_is_not():
    store = TCPStore("127.0.0.1", free_port(), is_master=True, wait_for_workers=False)
    missed = threading.Event()
    with Heartbeat("127.0.0.1", store.port, 0, 3, 0.6, missed.set) as watching:
        with Heartbeat("127.0.0.1", store.port, 1, 3, 0.6, lambda: None) as other:
            assert not missed.wait(1.5), "machine 2 has not joined yet, and machine 1 is there"
        assert missed.wait(3) and watching.lost == 1
        assert other.lost is None, "it had left itself"


def test_a_store_that_no_longer_answers_is_the_loss_of_the_machine_that_serves_it():
    missed = threading.Event()
    store = TCPStore("127.0.0.1", free_port(), is_master=True, wait_for_workers=False)
    with Heartbeat("127.0.0.1", store.port, 1, 2, 0.6, missed.set) as watching:
        for _ in range(5):
            store.add("heartbeat/0", 1)
            assert not missed.wait(0.2)
        del store
        assert missed.wait(3) and watching.lost == 0


def test_a_port_in_use_is_one_line(tmp_path, data_loc):
    arguments = ("--stage", 0, "--va-name", "va", "--max-iter", 1)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        process = start_script(tmp_path, data_loc, *arguments, gpus="cpu,cpu", port=port)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    (line,) = err.splitlines()
    assert line.startswith(f"error: --port {port} is in use on this machine") and "give another" in line


@pytest.mark.slow
def test_two_runs_of_several_processes_share_a_machine_and_leave_no_temporary_files(tmp_path, data_loc, monkeypatch):
    (tmp_path / "temporary").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    runs = [start_script(tmp_path, data_loc, "--stage", 0, "--va-name", f"va{i}", "--max-iter", 9) for i in range(2)]
    for run in runs:
        out, err = run.communicate(timeout=120)
        assert run.returncode == 0 and "2 x cpu" in out and "done:" in out, err
    assert not list((tmp_path / "temporary").iterdir())


def two_machines(folder: Path, data_loc: Path) -> list:
    meeting = ["--nnodes", 2, "--stage", 0, "--va-name", "va", "--max-iter", 9999, "--node-timeout", 6]
    port = free_port()
    nodes = [start_script(folder, data_loc, *meeting, "--node-rank", rank, gpus="cpu", port=port) for rank in range(2)]
    wait_for(nodes[0], " 7/9999 ")
    return nodes


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGSTOP, signal.SIGKILL])
def test_a_machine_that_goes_away_ends_the_job_on_the_other(tmp_path, data_loc, how):
    first, second = two_machines(tmp_path, data_loc)
    gone = family(second.pid)
    began = time.monotonic()
    send(how, gone)  # stopped processes keep their connections, as a machine without power or network seems to
    try:
        _, err = first.communicate(timeout=90)
    finally:
        send(signal.SIGKILL, gone if how == signal.SIGSTOP else [])
        second.communicate()
    assert time.monotonic() - began < 60
    if how == signal.SIGKILL:
        assert first.returncode == LOST_PEER and err.startswith("error: another process of this run went away"), err
        return
    assert first.returncode == FAILED
    assert err.startswith("error: machine 1 (--node-rank) has not been heard of for 6 s"), err
    saved = load_checkpoint(tmp_path / "a b/ckpt/va/ckpt_latest.pt")["current_iters"]
    # On one machine now; whatever the line says about two is overridden.
    again = run_printed(printed_command(err), "--max-iter", str(saved + 1), "--nnodes", "1", "--node-rank", "0")
    assert again.returncode == 0 and f"resume: va at iteration {saved}" in again.stdout, again.stderr


@pytest.mark.slow
def test_processes_whose_launcher_was_killed_save_and_end(tmp_path, data_loc):
    process = start_script(tmp_path, data_loc, "--stage", 0, "--va-name", "va", "--max-iter", 9999)
    wait_for(process, " 7/9999 ")
    below = family(process.pid)[1:]
    process.kill()
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{pid}").exists() for pid in below) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not [pid for pid in below if Path(f"/proc/{pid}").exists()]
    out, _ = process.communicate()
    saved = load_checkpoint(tmp_path / "a b/ckpt/va/ckpt_latest.pt")["current_iters"]
    assert f"stopped at iteration {saved}, saved" in out
