"""Random access to the frames of a video file by three libraries, which return the same frames.

Each reader opens its library's decoder when a frame is first asked for, and opens it anew after an error (decoders
answer wrongly then) and in a process forked since (decoders own threads and file positions).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from data_utils.video.index import VideoIndex, video_error

OTHERS = 'use reader "pyav" (--video_reader pyav)'


class VideoReader(ABC):
    """Single frames of one video. For one thread at a time.

    Args:
        index: of the video.
        threads: decoding threads.
    """

    def __init__(self, index: VideoIndex, threads: int = 1) -> None:
        self.index = index
        self._threads = threads
        self._decoder: Any = None
        self._pid = os.getpid()
        self.check(index)

    @property
    def times(self) -> np.ndarray:
        """(N,) float64: when each frame is shown, seconds as stored, increasing."""
        return self.index.times

    @property
    def frame_interval(self) -> float:
        """Median time between frames, seconds."""
        return self.index.frame_interval

    def __len__(self) -> int:
        return len(self.index)

    def read(self, index: int) -> np.ndarray:
        """Frame ``index`` (0 to N - 1, in the order of :attr:`times`) as (H, W, 3) uint8 RGB, contiguous.

        Raises:
            DataError: rule "video": the frame cannot be decoded.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"{self.index.path}: frame {index} of {len(self)}")
        if self._pid != os.getpid():
            self.abandon()
        try:
            if self._decoder is None:
                self._decoder = self._open()
            image = self._decode(int(index))
            if image.ndim != 3 or image.shape[2] != 3:  # decord does so for some frames less than 64 pixels wide
                raise video_error(self.index.path, f"{self.library} decodes it to shape {image.shape}; {OTHERS}")
        except BaseException:
            self.close()
            raise
        return np.ascontiguousarray(image)

    def close(self) -> None:
        """Let the decoder go; a later :meth:`read` opens it again."""
        if self._pid != os.getpid():
            self.abandon()
        decoder, self._decoder = self._decoder, None
        if decoder is not None:
            self._close(decoder)

    def abandon(self) -> None:
        """In a forked process: forget the parent's decoder. Freeing it would wait for threads that are not here."""
        if self._decoder is not None:
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._decoder))  # never freed
        self._decoder = None
        self._pid = os.getpid()

    def __del__(self) -> None:
        if getattr(self, "_decoder", None) is not None:
            self.close()

    def _error(self, index: int, what: object) -> Exception:
        at = self.times[index]
        what = re.sub(
            r"\[\d\d:\d\d:\d\d\] |/?\S+\.(cc|cpp):\d+[:,] ", "", str(what)
        )  # places in the library's own source
        return video_error(self.index.path, f"frame {index} at {at:.3f} s cannot be decoded by {self.library}: {what}")

    library: str  # as users know it
    open_at_most: int = sys.maxsize  # decoders worth keeping open for random access

    @classmethod
    @abstractmethod
    def check(cls, index: VideoIndex) -> None:
        """Raises ``DataError`` where the library is missing, or would read this video wrongly."""

    @abstractmethod
    def _open(self) -> Any:
        """The library's decoder."""

    @abstractmethod
    def _decode(self, index: int) -> np.ndarray:
        """Frame ``index`` as (H, W, 3) uint8 RGB."""

    @abstractmethod
    def _close(self, decoder: Any) -> None:
        """Free what dropping the decoder does not."""


class PyAVReader(VideoReader):
    """Seeks to the key frame before and decodes forward; the next frame in sequence needs no seek.

    Frames are found by their presentation time, so none can be taken for another. What the decoder marks as damaged
    is refused, with all that follows up to the next key frame.
    """

    library = "PyAV"

    @classmethod
    def check(cls, index: VideoIndex) -> None:
        pass  # the index was read with PyAV

    def _open(self) -> Any:
        import av

        try:
            container = av.open(self.index.path, metadata_errors="replace")
        except (av.FFmpegError, OSError) as error:
            raise video_error(self.index.path, f"cannot be opened by PyAV: {error}") from error
        stream = container.streams.video[0]
        stream.codec_context.thread_count = self._threads
        return _Playback(container)

    def _close(self, decoder: _Playback) -> None:
        decoder.frames = iter(())
        decoder.container.close()

    def _decode(self, index: int) -> np.ndarray:
        import av

        pts, keys, last = int(self.index.pts[index]), self.index.keys, self._decoder.last
        key = max(int(np.searchsorted(keys, pts, side="right")) - 1, 0)
        try:
            follows = last is not None and last < pts and (last >= keys[key] or last == self.index.pts[index - 1])
            image = self._forward(index, pts) if follows else None
            # A seek may land behind the frame, or where it cannot be decoded from: then one key frame earlier.
            for start in range(key, max(key - 3, -1), -1):
                if image is not None:
                    break
                self._seek(int(keys[start]))
                image = self._forward(index, pts)
        except (av.FFmpegError, OSError) as error:
            raise self._error(index, error) from error
        if image is None:
            raise self._error(index, "the decoder leaves it out")
        return image

    def _seek(self, pts: int) -> None:
        play = self._decoder
        stream = play.container.streams.video[0]
        play.container.seek(pts, stream=stream)
        play.frames, play.last, play.damaged = play.container.decode(stream), None, False

    def _forward(self, index: int, pts: int) -> np.ndarray | None:
        """Decode up to the frame shown at ``pts``; None where the decoder has passed it."""
        play = self._decoder
        for frame in play.frames:
            if frame.pts is None:
                continue
            play.last = frame.pts
            play.damaged = frame.is_corrupt or (play.damaged and not frame.key_frame)
            if frame.pts == pts:
                if play.damaged:
                    raise self._error(index, "it is damaged; record the video again")
                # By itself, the conversion to RGB starts a thread per core.
                return np.rot90(frame.to_ndarray(format="rgb24", threads=self._threads), frame.rotation // 90)
            if frame.pts > pts:
                return None
        return None


@dataclass
class _Playback:
    """An open container, and how far it is decoded."""

    container: Any
    frames: Iterator[Any] = iter(())
    last: int | None = None  # pts of the frame decoded last
    damaged: bool = False  # since the last key frame


def decord_misreads(index: VideoIndex) -> str:
    """What about a video decord cannot decode or would get wrong, as in "videos that are AV1"; "" where nothing."""
    if index.codec == "av1":
        return "are AV1"
    if index.hidden:
        return "have frames hidden by an edit list"
    if not index.keys_in_order:
        return "store frames behind the key frame that follows them"
    return ""


class DecordReader(VideoReader):
    """decord counts frames from the key frame's place in the file, and counts hidden frames: videos where that goes
    wrong are refused. It does not tell of damaged frames, and of those it cannot decode it tells too early: PyAV is
    asked then."""

    library = "decord"
    # An open decoder goes on decoding ahead, in a thread of its own, what random access never asks for: several of them
    # take five times as long per frame as opening one again.
    open_at_most = 1

    @classmethod
    def check(cls, index: VideoIndex) -> None:
        import_decord()
        if reason := decord_misreads(index):
            raise video_error(index.path, f"decord does not read videos rightly that {reason}; {OTHERS}")

    def _open(self) -> Any:
        decord = import_decord()
        decord.logging.set_level(decord.logging.QUIET)  # its errors become exceptions
        try:
            decoder = decord.VideoReader(self.index.path, ctx=decord.cpu(0), num_threads=self._threads)
        except (decord.DECORDError, RuntimeError, AssertionError) as error:
            what = f"cannot be opened by decord (codec {self.index.codec}); {OTHERS}: {error}"
            raise video_error(self.index.path, what) from error
        if len(decoder) != len(self.index):
            raise video_error(
                self.index.path, f"decord counts {len(decoder)} frames, the file holds {len(self.index)}; {OTHERS}"
            )
        return decoder

    def _decode(self, index: int) -> np.ndarray:
        decord = import_decord()
        try:
            return self._decoder[index].asnumpy()
        except (decord.DECORDError, decord.DECORDLimitReachedError, RuntimeError, StopIteration):
            # Of this frame or of one further on, which its thread has reached already: PyAV tells.
            self.close()
            with contextlib.closing(PyAVReader(self.index, self._threads)) as exact:
                return exact.read(index)

    def _close(self, decoder: Any) -> None:
        pass  # dropped


class TorchCodecReader(VideoReader):
    """torchcodec in its exact mode, which reads the whole container once when opened."""

    library = "torchcodec"

    @classmethod
    def check(cls, index: VideoIndex) -> None:
        import_torchcodec()
        if index.hidden:
            raise video_error(
                index.path, f"has frames hidden by an edit list, which torchcodec skips wrongly; {OTHERS}"
            )

    def _open(self) -> Any:
        decoders = import_torchcodec()
        try:
            decoder = decoders.VideoDecoder(
                self.index.path, dimension_order="NHWC", num_ffmpeg_threads=self._threads, device="cpu"
            )
        except (RuntimeError, ValueError) as error:
            raise video_error(self.index.path, f"cannot be opened by torchcodec: {error}") from error
        if len(decoder) != len(self.index):
            raise video_error(
                self.index.path, f"torchcodec counts {len(decoder)} frames, the file holds {len(self.index)}; {OTHERS}"
            )
        return decoder

    def _decode(self, index: int) -> np.ndarray:
        try:
            frame = self._decoder.get_frame_at(index)
        except (RuntimeError, IndexError) as error:
            raise self._error(index, f"{error}; {OTHERS}") from error
        if abs(frame.pts_seconds - self.times[index]) > 1e-6 + 1e-3 * self.frame_interval:
            raise self._error(index, f"it returned the frame of {frame.pts_seconds:.3f} s; {OTHERS}")
        return frame.data.numpy()

    def _close(self, decoder: Any) -> None:
        pass  # dropped


def import_decord() -> Any:
    try:
        import decord
    except ImportError as error:
        raise video_error("decord", f"not installed ({error}); run: pip install decord==0.6.0") from error
    return decord


def import_torchcodec() -> Any:
    try:
        from torchcodec import decoders
    except (ImportError, RuntimeError, OSError) as error:  # RuntimeError: FFmpeg's libraries are missing
        what = "run: pip install --no-deps torchcodec==0.13.0, and for FFmpeg's libraries: apt-get install ffmpeg"
        raise video_error("torchcodec", f"not usable; {what} ({error})") from error
    return decoders


READER_TYPES: dict[str, type[VideoReader]] = {
    "decord": DecordReader,
    "torchcodec": TorchCodecReader,
    "pyav": PyAVReader,
}
