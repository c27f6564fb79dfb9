"""A process that does one job at a time and may die over it, as its parent sees it."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from typing import Any

from data_utils.words import ending


class WorkerDied(Exception):
    """The process ended over a job, or before its first; the message says how ("was killed by SIGKILL ...")."""


class WorkerProcess:
    """Ready without a job at first, then with one job at a time.

    Args:
        handler: called in the process with every job; what it returns is the job's outcome. Pickled once, so what it
            opens it opens on first use. An exception that it lets out ends the process.
    """

    def __init__(self, handler: Callable[[Any], Any]) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(handler, theirs), daemon=True)
        # Inherited by the process: the parent alone decides what a Ctrl-C means. The first process of all would start
        # multiprocessing's resource tracker, which unblocks the signal: it must run already.
        resource_tracker.ensure_running()
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            self.process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        theirs.close()  # so that the pipe ends with the process
        self.job: Any = None

    def give(self, job: Any) -> None:
        """The next job; None ends the process."""
        self.job = job
        try:
            self.connection.send(job)
        except OSError:
            pass  # it died meanwhile: the pipe's end says so

    def outcome(self) -> Any:
        """Of the job given last, None before the first; waits for it.

        Raises:
            WorkerDied: the process ended.
        """
        try:
            return self.connection.recv()
        except (EOFError, OSError):
            self.process.join()
            raise WorkerDied(ending(self.process.exitcode)) from None

    def kill(self) -> None:
        self.process.kill()
        self.process.join()


def _work(handler: Callable[[Any], Any], connection: Connection) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    connection.send(None)  # ready
    while (job := connection.recv()) is not None:
        connection.send(handler(job))


def _end_with_parent() -> None:
    """A worker whose parent was killed must not go on working beside the parent's successor."""
    multiprocessing.parent_process().join()
    os._exit(1)
