"""The processes of one machine: torchrun (same flags), with signals passed on and one report of what went wrong.

    python -m train_utils.ranks --nproc_per_node 4 -m apt.train --config NAME ...

When a process ends badly the others are stopped, those that do not react within 30 seconds by force, and the failure
that came first is shown: its traceback or its one line. Of several machines, one that is silent for ``--node_timeout``
seconds ends the job on the others (``train_utils/heartbeat.py``).
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import signal
import sys
import tempfile
from pathlib import Path

from torch.distributed import DistNetworkError
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from train_utils.failures import FAILED, LOST_PEER, MISTAKE, NODE_TIMEOUT, TOLD, stop_with_parent
from train_utils.heartbeat import Heartbeat

_PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class _ToldEarly(BaseException):  # which passes by what torchrun catches
    """Told to stop before there was a process that could be told."""


class _PassOn:
    """Handler of signals: the processes are told to save and stop."""

    def __init__(self) -> None:
        self.told = False

    def __call__(self, *_args: object) -> None:
        before, self.told = self.told, True
        if not _tell_ranks(signal.SIGTERM) and not before:
            raise _ToldEarly


def main(argv: list[str] | None = None) -> int:
    stop_with_parent()
    pass_on = _PassOn()
    try:
        for number in _PASSED_ON:
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup
                signal.signal(number, pass_on)
        return _run(sys.argv[1:] if argv is None else argv, pass_on)
    except _ToldEarly:
        return TOLD


def _run(argv: list[str], pass_on: _PassOn) -> int:
    from torch.distributed.run import parse_args, run

    os.environ.setdefault("OMP_NUM_THREADS", "1")
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # reports every failure at length
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    own.add_argument("--node_timeout", type=float, default=NODE_TIMEOUT)
    own, rest = own.parse_known_args(argv)
    arguments = parse_args(rest)
    arguments.signals_to_handle = "SIGQUIT"  # torchrun would give processes that save 30 seconds
    heartbeat = _heartbeat(arguments, own.node_timeout)
    try:
        with heartbeat or contextlib.nullcontext(), tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            arguments.log_dir = folder  # of the ranks' reports; torchrun's own would stay
            run(arguments)
    except ChildFailedError as error:
        text, code = describe_failures(error.failures)
        if heartbeat is not None and heartbeat.lost is not None:
            text = (
                f"error: machine {heartbeat.lost} (--node-rank) has not been heard of for {own.node_timeout:g} s; the "
                "processes on this one were stopped"
            )
            code = FAILED
        elif pass_on.told and _first(error.failures)[1].exitcode == -signal.SIGTERM:
            return TOLD  # it was not yet in the loop, where the signal is caught
        print(text, file=sys.stderr, flush=True)
        return code
    except DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        where = f"--port {arguments.master_port} is in use on this machine, perhaps by another run"
        print(f"error: {where}; give another, the same on every machine", file=sys.stderr, flush=True)
        return MISTAKE
    except SignalException:
        print("error: stopped at once, without saving", file=sys.stderr, flush=True)
        return 128 + signal.SIGQUIT
    return 0


def _heartbeat(arguments: argparse.Namespace, patience_s: float) -> Heartbeat | None:
    """Over the store that torchrun's machines meet at; None for one machine."""
    if arguments.standalone or int(arguments.nnodes) == 1:
        return None
    # Ranks wait in a collective that cannot end: nothing but force reaches them.
    return Heartbeat(
        arguments.master_addr, arguments.master_port, arguments.node_rank, int(arguments.nnodes), patience_s,
        on_loss=lambda: _tell_ranks(signal.SIGKILL),
    )  # fmt: skip


def _tell_ranks(number: int) -> int:
    """Send a signal to the processes below this one; returns how many there are."""
    told = 0
    for task in Path("/proc/self/task").iterdir():
        for child in (task / "children").read_text().split():
            with contextlib.suppress(ProcessLookupError):  # it has just ended
                os.kill(int(child), number)
                told += 1
    return told


def _first(failures: dict[int, ProcessFailure]) -> tuple[int, ProcessFailure]:
    # Processes that lost another one may be found before the one they lost.
    return min(failures.items(), key=lambda item: (item[1].exitcode == LOST_PEER, item[1].timestamp))


def describe_failures(failures: dict[int, ProcessFailure]) -> tuple[str, int]:
    """The report of the failure that came first, and the exit code for all of them.

    Args:
        failures: by rank.
    """
    rank, first = _first(failures)
    if first.exitcode < 0:
        name = signal.Signals(-first.exitcode).name
        hint = ": by hand, or by the system when memory ran out" if name == "SIGKILL" else ""
        return f"error: rank {rank} (process {first.pid}) was ended by {name}{hint}; the others were stopped", 1
    if not first.error_file_data:
        return f"error: rank {rank} (process {first.pid}) ended with exit code {first.exitcode}, without a report", 1
    report = first.message
    if report.startswith("error: "):
        return report, first.exitcode
    return f"{report}\nerror: rank {rank} failed with the traceback above; the others were stopped", first.exitcode


if __name__ == "__main__":
    sys.exit(main())
