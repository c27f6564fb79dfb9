"""Shared-memory segments: files in /dev/shm, each written by one process and read by one other.

The writer creates a segment (mode 0600) and names it in its message; the reader maps it and removes the name at once.
From then on the kernel frees the memory when both processes are gone, however they went. A name is therefore visible
only between a message's sending and its arrival. The writer holds a lock (``flock``) on the file, which the kernel
drops with the process, so a name without a lock has a dead owner and anyone of the same user may remove it.

Python's ``multiprocessing.shared_memory`` is not used: until 3.13 its resource tracker also claims segments that a
process has merely attached, and unlinks them when that process ends.

Both ends run as one user. As such they could end each other anyway, so a reader does not guard against a writer that
shortens the file under it.
"""

from __future__ import annotations

import logging
import mmap
import os
import re
import secrets
import stat
import time
from typing import Any

from .errors import MalformedMessage

try:
    import fcntl
except ImportError:  # not a Unix: everything goes through the socket
    fcntl = None  # type: ignore[assignment]

log = logging.getLogger("shm_transport")

DIRECTORY = "/dev/shm"
PREFIX = "apt-shm-"
FIRST_SIZE = 1 << 20
RETRY_FULL_S = 10.0  # after /dev/shm was full
_NAME = re.compile(r"apt-shm-\d{1,10}-[0-9a-f]{32}\Z")  # of the writer's process id and a random number


def available() -> bool:
    """Whether this system has shared memory as files."""
    return fcntl is not None and hasattr(os, "posix_fallocate") and os.path.isdir(DIRECTORY)


class Segment:
    """A segment that this process created: ``size`` bytes at ``buffer``, under ``name`` until the reader has it."""

    def __init__(self, size: int):
        """Raises OSError where there is no room."""
        while True:
            self.name = f"{PREFIX}{os.getpid()}-{secrets.token_hex(16)}"
            path = os.path.join(DIRECTORY, self.name)
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX)
                if os.fstat(fd).st_nlink == 0:
                    continue  # taken for a dead owner's, before the lock
                os.posix_fallocate(fd, 0, size)  # a full file system fails here, not by SIGBUS when written
                self.buffer = mmap.mmap(fd, size)  # keeps the file, and so the lock, open
                break
            except BaseException:
                _unlink(self.name)
                raise
            finally:
                os.close(fd)
        self.size = size
        self._pid = os.getpid()

    def close(self) -> None:
        """Remove the name, if the reader has not, and let go of the memory."""
        if os.getpid() == self._pid:  # a forked child holds a copy of the parent's
            _unlink(self.name)
        _unmap(self.buffer)


class SegmentWriter:
    """One direction of a pair, on its writing side: a segment that is reused, and replaced when it is too small."""

    def __init__(self, limit: int):
        """``limit``: bytes that one message may take."""
        self.created = 0  # how often memory was allocated
        self.segment: "Segment | None" = None
        self._limit = limit
        self._full_until = 0.0
        self._warned = False

    def reserve(self, nbytes: int) -> bool:
        """Make room for ``nbytes``. False if shared memory is full: the message then goes through the socket."""
        current = self.segment
        if current is not None and nbytes <= current.size:
            return True
        if nbytes > self._limit or time.monotonic() < self._full_until:
            return False
        wanted = max(nbytes, FIRST_SIZE, min(2 * current.size, self._limit) if current is not None else 0)
        size = -(-wanted // mmap.PAGESIZE) * mmap.PAGESIZE
        try:
            self.segment = Segment(size)
        except OSError as error:
            self._full_until = time.monotonic() + RETRY_FULL_S
            if not self._warned:
                self._warned = True
                log.warning(
                    "no room for %d bytes in %s (%s): large arrays go through the socket", size, DIRECTORY, error
                )
            return False
        self.created += 1
        if current is not None:
            current.close()
        return True

    def close(self) -> None:
        """Give the memory back."""
        if self.segment is not None:
            self.segment.close()
            self.segment = None


class SegmentReader:
    """One direction of a pair, on its reading side: the writer's current segment, mapped read-only."""

    def __init__(self) -> None:
        self._name = ""
        self._map: Any = None

    def map(self, name: str, used: int) -> Any:
        """The writer's segment, of which the message uses ``used`` bytes. Raises MalformedMessage for one that is not
        the peer's to name or is smaller than that."""
        if name != self._name:
            mapped = open_segment(name)
            self.close()
            self._name, self._map = name, mapped
        if used > len(self._map):
            raise MalformedMessage(f"the message uses {used} bytes of a segment of {len(self._map)}")
        return self._map

    def close(self) -> None:
        """Let go of the memory."""
        if self._map is not None:
            _unmap(self._map)
            self._name, self._map = "", None


def open_segment(name: str) -> Any:
    """Map another process's segment read-only and remove its name."""
    if not available() or not _NAME.match(name):
        raise MalformedMessage(f"{name[:80]!r} is not the name of a segment")
    path = os.path.join(DIRECTORY, name)
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise MalformedMessage(f"the segment {name} cannot be opened: {error.strerror}") from None
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid() or stat.S_IMODE(status.st_mode) != 0o600:
            raise MalformedMessage(f"the segment {name} is not a private file of this user")
        if status.st_size == 0:
            raise MalformedMessage(f"the segment {name} is empty")
        mapped = mmap.mmap(fd, status.st_size, prot=mmap.PROT_READ)
    except OSError as error:
        raise MalformedMessage(f"the segment {name} cannot be mapped: {error}") from None
    finally:
        os.close(fd)
    _unlink(name)
    return mapped


def stale_segments() -> list[tuple[str, int]]:
    """Names and sizes of this user's segments whose owners are dead."""
    return _dead(remove=False)


def reclaim_stale() -> list[str]:
    """Remove this user's segments whose owners are dead; their names."""
    return [name for name, _ in _dead(remove=True)]


def _dead(remove: bool) -> list[tuple[str, int]]:
    found = []
    for name in os.listdir(DIRECTORY) if available() else []:
        if not _NAME.match(name):
            continue
        try:
            fd = os.open(os.path.join(DIRECTORY, name), os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            continue  # another user's, or gone by now
        try:
            status = os.fstat(fd)
            if stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid():
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                found.append((name, status.st_size))
                if remove:
                    _unlink(name)
        except BlockingIOError:
            continue  # its owner lives
        finally:
            os.close(fd)
    return found


def _unlink(name: str) -> None:
    try:
        os.unlink(os.path.join(DIRECTORY, name))
    except FileNotFoundError:
        pass  # the other side was first


def _unmap(mapped: Any) -> None:
    try:
        mapped.close()
    except BufferError:
        pass  # an array still looks at it; the memory goes with the last one
