"""How a training process ends when something goes wrong: what it says, and its exit code.

One process alone says so itself. Of several, each leaves its report in the file that torchrun names to it, and the
process that started them (``train_utils/ranks.py``) shows the first: the others fail only because that one did.
"""

from __future__ import annotations

import ctypes
import errno
import json
import multiprocessing
import os
import signal
import sys
import time
import traceback

from train_utils.errors import DiskFullError, RunFailed

MISTAKE, FAILED, LOST_PEER = 2, 1, 3  # exit codes; 2: something that the user can put right before a run
TOLD = 128 + signal.SIGTERM  # of a launcher whose processes were told to stop where there was nothing to save
NODE_TIMEOUT = 60.0  # seconds of silence after which another machine counts as gone, unless told otherwise
RESUME_VARIABLE = "APT_RESUME_COMMAND"  # how a launcher tells its process the line that resumes it
_PR_SET_PDEATHSIG = 1
_ERROR_FILE = "TORCHELASTIC_ERROR_FILE"
# What gloo and NCCL say in the processes that are left when one goes away.
_LOST_PEER_TEXTS = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Timed out waiting",
    "remote process exited",
    "Socket Timeout",
    "NCCL communicator was aborted",
)


def stop_with_parent() -> None:
    """Where a launcher started this process: be told (SIGTERM) when it is killed, rather than hold the GPUs on."""
    if RESUME_VARIABLE in os.environ or "TORCHELASTIC_RUN_ID" in os.environ:
        told_when_parent_dies()


def told_when_parent_dies() -> None:
    """From now on this process gets SIGTERM when the one that started it is gone."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def fail(error: Exception, mistakes: tuple[type[Exception], ...]) -> int:
    """Report the exception that ended this process; returns the exit code, or ends the process where it is one of many.

    Args:
        mistakes: exceptions that a line of text explains, as :class:`RunFailed` and a full disk are too.
    """
    code = _exit_code(error, mistakes)
    expected = code != FAILED or isinstance(error, RunFailed) or _is_disk_full(error)
    text = f"error: {_describe(error)}" if expected else "".join(traceback.format_exception(error)).rstrip()
    if _ERROR_FILE not in os.environ:
        print(text, file=sys.stderr, flush=True)
        return code
    with open(os.environ[_ERROR_FILE], "w", encoding="utf-8") as file:
        json.dump({"message": text, "timestamp": int(time.time())}, file)
    sys.stdout.flush()
    # An orderly exit would wait for the other processes, which wait for this one.
    for child in multiprocessing.active_children():
        child.kill()
    os._exit(code)


def _exit_code(error: Exception, mistakes: tuple[type[Exception], ...]) -> int:
    if isinstance(error, mistakes):
        return MISTAKE
    lost = isinstance(error, RuntimeError) and any(text in str(error) for text in _LOST_PEER_TEXTS)
    return LOST_PEER if lost else FAILED


def _describe(error: Exception) -> str:
    if _is_disk_full(error) and not isinstance(error, DiskFullError):
        where = f" while writing {error.filename}" if error.filename else ""
        return f"the disk is full{where}; make room (checkpoints, logs), then resume the run"
    if _exit_code(error, ()) == LOST_PEER:
        return f"another process of this run went away ({str(error).splitlines()[0]}); its own report says why"
    return str(error)


def _is_disk_full(error: Exception) -> bool:
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
