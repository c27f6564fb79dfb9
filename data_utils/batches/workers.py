"""How loader workers start, work alone and report."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator

import cv2
import torch
from torch.utils.data import DataLoader

from data_utils.errors import DataError


def single_threaded(_worker: int) -> None:
    """Workers are the parallelism; threads inside them only fight over the cores."""
    cv2.setNumThreads(0)
    torch.set_num_threads(1)


def start_workers(loader: DataLoader) -> Iterator:
    """``iter(loader)``, whose workers may die without torch's handler, which would raise in the middle of whatever
    the main thread does; asking for the next batch finds them dead."""
    handler = signal.getsignal(signal.SIGCHLD)
    try:
        return iter(loader)
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGCHLD, handler or signal.SIG_DFL)


def without_traceback(error: DataError) -> DataError:
    """The error as it was in the worker; torch puts the worker's traceback into the message."""
    for line in reversed(str(error).splitlines()):
        if "DataError: " in line:
            return DataError(line.split("DataError: ", 1)[1], error.rule)
    return error
