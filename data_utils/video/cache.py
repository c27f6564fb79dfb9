"""Frames of video files by time: open one video, or keep a bounded number of them open.

``decord`` is the default. ``torchcodec`` and ``pyav`` read every codec that FFmpeg knows, AV1 included, and open groups
of pictures; only ``pyav`` tells of damaged frames (see :func:`check_video`).
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict

import numpy as np

from data_utils.video.index import VideoIndex, read_index, video_error
from data_utils.video.readers import READER_TYPES, PyAVReader, VideoReader

READERS = tuple(READER_TYPES)
TOLERANCE = 0.75  # frame intervals between the time wanted and the nearest frame
MAX_INDEXED_FRAMES = 2_000_000  # some 50 MB; indexes are far smaller than decoders, and dearer to read than to keep


def open_video(path: str | os.PathLike, reader: str = "decord", threads: int = 1) -> VideoReader:
    """Open a video for random access to its frames.

    Args:
        path: the file.
        reader: one of :data:`READERS`.
        threads: decoding threads. One is right where several worker processes decode.
    Returns:
        ``times`` (N,) seconds, ``frame_interval`` seconds, ``len()``, ``close()``, and ``read(index)``, which returns
        (H, W, 3) uint8 RGB.
    Raises:
        DataError: rule "video": the file cannot be read, or the library is missing or would read it wrongly.
        ValueError: an unknown reader.
    """
    _check_reader(reader)
    return READER_TYPES[reader](read_index(path), threads)


def check_video(path: str | os.PathLike) -> VideoIndex:
    """Decode every frame of a video once with PyAV, the one library that tells of damage.

    Raises:
        DataError: rule "video": names the first frame that does not decode or is damaged.
    """
    index = read_index(path)
    reader = PyAVReader(index)
    try:
        for frame in range(len(index)):
            reader.read(frame)
    finally:
        reader.close()
    return index


class VideoCache:
    """Frames of many videos by time, with the decoders used last kept open.

    Several threads may ask at once: different videos are decoded in parallel, one video by one thread at a time. In a
    forked process the parent's decoders are left alone, and a pickled cache arrives empty.

    Args:
        reader: one of :data:`READERS`.
        max_open: decoders kept open (those being read at a moment come on top); fewer where the library does better so.
        threads: decoding threads of each decoder.
    """

    def __init__(self, reader: str = "decord", max_open: int = 16, threads: int = 1) -> None:
        _check_reader(reader)
        if max_open < 1:
            raise ValueError(f"max_open is {max_open}; at least one decoder must be open")
        self._reader, self._threads = reader, threads
        self._max_open = min(max_open, READER_TYPES[reader].open_at_most)
        self._state = _State()

    def __reduce__(self):
        return VideoCache, (self._reader, self._max_open, self._threads)

    def frame(self, path: str | os.PathLike, time: float) -> np.ndarray:
        """The frame shown nearest to ``time``.

        Args:
            path: the video.
            time: seconds, on the clock that the video stores.
        Returns:
            (H, W, 3) uint8 RGB.
        Raises:
            DataError: rule "video": the file cannot be read, or no frame is within 0.75 frame intervals of ``time``.
        """
        path = os.fspath(path)
        slot = self._slot(path)
        # Only the lock of this video is held while decoding. A slot that is evicted meanwhile lives on until here.
        with slot.lock:
            if slot.reader is None:
                slot.reader = READER_TYPES[self._reader](self._index(path), self._threads)
            return slot.reader.read(nearest_frame(slot.reader.index, time))

    def span(self, path: str | os.PathLike) -> tuple[float, float, float]:
        """(first time, last time, frame interval) of a video in seconds, without decoding.

        Raises:
            DataError: rule "video": the file cannot be read, or not rightly by this cache's reader.
        """
        index = self._index(os.fspath(path))
        return float(index.times[0]), float(index.times[-1]), index.frame_interval

    def close(self) -> None:
        """Close all decoders; the cache stays usable."""
        state = self._own_state()
        with state.lock:
            slots = list(state.slots.values())
            state.slots.clear()
            state.indexes.clear()
            state.indexed_frames = 0
        for slot in slots:
            with slot.lock:
                if slot.reader is not None:
                    slot.reader.close()
                    slot.reader = None

    def _own_state(self) -> _State:
        """This process's decoders and locks. After a fork, a lock may be held for ever by a thread of the parent."""
        state = self._state
        if state.pid != os.getpid():
            for slot in state.slots.values():
                if slot.reader is not None:
                    slot.reader.abandon()
            state = self._state = _State()
        return state

    def _slot(self, path: str) -> _Slot:
        state = self._own_state()
        with state.lock:
            slot = state.slots.get(path)
            if slot is None:
                slot = state.slots[path] = _Slot()
                while len(state.slots) > self._max_open:
                    state.slots.popitem(last=False)  # closes itself with its last user
            state.slots.move_to_end(path)
            return slot

    def _index(self, path: str) -> VideoIndex:
        state = self._own_state()
        with state.lock:
            index = state.indexes.get(path)
            if index is not None:
                state.indexes.move_to_end(path)
        if index is None:
            index = read_index(path)
            READER_TYPES[self._reader].check(index)
            with state.lock:
                if path not in state.indexes:
                    state.indexes[path] = index
                    state.indexed_frames += len(index)
                while state.indexed_frames > MAX_INDEXED_FRAMES and len(state.indexes) > 1:
                    state.indexed_frames -= len(state.indexes.popitem(last=False)[1])
        return index


def nearest_frame(index: VideoIndex, time: float) -> int:
    """The frame shown nearest to ``time`` (the earlier of two equally near).

    Raises:
        DataError: rule "video": it is more than 0.75 frame intervals away; names the time and the video's span.
    """
    after = int(np.searchsorted(index.times, time))
    candidates = [i for i in (after - 1, after) if 0 <= i < len(index)]
    best = min(candidates, key=lambda i: abs(index.times[i] - time))
    if not abs(index.times[best] - time) <= TOLERANCE * index.frame_interval:  # also where time is not a number
        span = f"{index.times[0]:.3f} to {index.times[-1]:.3f} s"
        what = f"no frame near {time:.3f} s: it spans {span}, a frame every {index.frame_interval:.3f} s"
        raise video_error(index.path, f"{what}; is it the right video, whole, with the right times?")
    return best


class _Slot:
    """One video of the cache: its decoder, once opened, and the lock under which it is used."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.reader: VideoReader | None = None


class _State:
    """What belongs to one process: the slots and indexes, least recently used first, and the lock around both."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self.lock = threading.Lock()
        self.slots: OrderedDict[str, _Slot] = OrderedDict()
        self.indexes: OrderedDict[str, VideoIndex] = OrderedDict()
        self.indexed_frames = 0


def _check_reader(reader: str) -> None:
    if reader not in READER_TYPES:
        raise ValueError(f"unknown video reader {reader!r}; known are {', '.join(READERS)}")
