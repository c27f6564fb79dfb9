"""The processes of one machine: torchrun (same flags), with signals passed on and one report of what went wrong.

    python -m train_utils.ranks --nproc_per_node 4 -m apt.train --config NAME ...

When a process ends badly the others are stopped, those that do not react within 30 seconds by force, and the failure
that came first is shown: its traceback or its one line.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from pathlib import Path

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from train_utils.failures import LOST_PEER

_PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def main(argv: list[str] | None = None) -> int:
    from torch.distributed.run import parse_args, run

    os.environ.setdefault("OMP_NUM_THREADS", "1")
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # reports every failure at length
    for number in _PASSED_ON:
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup
            signal.signal(number, _pass_on)
    arguments = parse_args(sys.argv[1:] if argv is None else argv)
    arguments.signals_to_handle = "SIGQUIT"  # torchrun would give processes that save 30 seconds
    try:
        run(arguments)
    except ChildFailedError as error:
        text, code = describe_failures(error.failures)
        print(text, file=sys.stderr, flush=True)
        return code
    except SignalException:
        print("error: stopped at once, without saving", file=sys.stderr, flush=True)
        return 128 + signal.SIGQUIT
    return 0


def _pass_on(_number: int, _frame) -> None:
    """Tell every process to save and stop."""
    for task in Path("/proc/self/task").iterdir():
        for child in (task / "children").read_text().split():
            os.kill(int(child), signal.SIGTERM)


def describe_failures(failures: dict[int, ProcessFailure]) -> tuple[str, int]:
    """The report of the failure that came first, and the exit code for all of them.

    Args:
        failures: by rank.
    """
    # Processes that lost another one may be found before the one they lost.
    rank, first = min(failures.items(), key=lambda item: (item[1].exitcode == LOST_PEER, item[1].timestamp))
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
