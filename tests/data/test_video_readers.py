"""Video readers: the same frames from every library at the right times, and damage named instead of returned."""

from __future__ import annotations

import importlib.util
import os
import pickle
import subprocess
import sys
import threading
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from data_utils.errors import DataError
from data_utils.video import READERS, VideoCache, check_video, open_video
from tests.conftest import VIDEOS

NUM_FRAMES = 50
X264 = {"sc_threshold": "0", "keyint_min": "12"}
TICKS = Fraction(1, 600)
STEADY = np.arange(NUM_FRAMES) * 20  # 30 frames per second
# 15 to 50 frames per second, from 2 s on
UNEVEN = 1200 + np.cumsum([0, *np.random.default_rng(0).integers(12, 40, NUM_FRAMES - 1)])


@pytest.fixture(params=READERS)
def reader(request) -> str:
    if importlib.util.find_spec({"pyav": "av"}.get(request.param, request.param)) is None:
        pytest.skip(f"{request.param} is not installed")
    return request.param


def picture(number: int, height: int, width: int) -> np.ndarray:
    """(H, W, 3): a gradient, with the frame's number in eight black or white blocks along the top."""
    y, x = np.mgrid[:height, :width]
    image = np.stack([np.full((height, width), 60), (2 * x + 5 * number) % 200, (3 * y) % 200], axis=-1).astype(
        np.uint8
    )
    for bit, block in enumerate(np.array_split(np.arange(width), 8)):
        image[: height // 4, block] = 230 if number >> bit & 1 else 20
    return image


def number_in(image: np.ndarray) -> int:
    height, width = image.shape[:2]
    blocks = np.array_split(np.arange(width), 8)
    return sum(
        int(image[height // 16 : height // 5, block[2:-2]].mean() > 125) << bit for bit, block in enumerate(blocks)
    )


def encode(
    path: Path, ticks=STEADY, codec="libx264", size=(96, 128), options=X264, time_base=TICKS, pixels="yuv420p"
) -> Path:
    """A video of ``picture(0..)`` shown at ``ticks``: B-frames, and a key frame at least every 12 frames."""
    with av.open(str(path), "w", options={"movflags": "faststart"} if path.suffix == ".mp4" else {}) as container:
        stream = container.add_stream(codec, rate=30, options=options)
        stream.height, stream.width = size
        stream.pix_fmt = pixels
        stream.time_base = stream.codec_context.time_base = time_base
        stream.codec_context.gop_size = 12
        if codec == "libx264":
            stream.codec_context.max_b_frames = 2
        for number, tick in enumerate(ticks):
            frame = av.VideoFrame.from_ndarray(picture(number, *size), "rgb24")
            frame.pts, frame.time_base = int(tick), time_base
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def packets(path: Path) -> list[tuple[int, int]]:
    """(position, size) of the packets, as stored."""
    with av.open(str(path)) as container:
        return [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]


def assert_frames_in_any_order(video) -> None:
    order = np.r_[np.random.default_rng(1).permutation(len(video)), np.arange(len(video)), len(video) - 1]
    assert [number_in(video.read(int(i))) for i in order] == order.tolist()


@pytest.fixture(scope="module")
def steady(tmp_path_factory) -> Path:
    return encode(tmp_path_factory.mktemp("steady") / "steady.mp4")


@pytest.fixture(scope="module")
def uneven(tmp_path_factory) -> Path:
    """Variable frame rate, not from 0, a size that is no multiple of the codec's blocks."""
    return encode(tmp_path_factory.mktemp("uneven") / "uneven.mp4", UNEVEN, size=(98, 130))


def with_open_groups(path: Path) -> Path:
    return encode(path, UNEVEN, options={**X264, "x264-params": "open-gop=1:bframes=3"})


# -- the frames ---------------------------------------------------------------------------------------------------


def test_any_frame_is_read_in_any_order_at_its_stored_time(reader, uneven):
    video = open_video(uneven, reader)
    assert len(video) == NUM_FRAMES
    np.testing.assert_allclose(video.times, UNEVEN * float(TICKS), atol=1e-9)
    assert video.times.dtype == np.float64
    assert video.frame_interval == pytest.approx(float(np.median(np.diff(UNEVEN))) / 600)
    assert_frames_in_any_order(video)
    video.close()
    assert number_in(video.read(7)) == 7  # opens again


def test_frames_are_contiguous_rgb_of_the_stored_size(reader, uneven):
    image = open_video(uneven, reader).read(13)
    assert image.shape == (98, 130, 3) and image.dtype == np.uint8 and image.flags.c_contiguous
    assert np.abs(image[40:].astype(int) - picture(13, 98, 130)[40:]).mean() < 12  # not with red and blue exchanged
    with pytest.raises(IndexError):
        open_video(uneven, reader).read(NUM_FRAMES)


@pytest.mark.parametrize("colours", ["colormatrix=bt709", "fullrange=on", "colormatrix=bt709:fullrange=on"])
def test_readers_agree_on_colours(reader, tmp_path, colours):
    path = encode(tmp_path / "colours.mp4", STEADY[:14], options={**X264, "x264-params": colours})
    wanted = open_video(path, "pyav").read(13).astype(int)
    assert np.abs(open_video(path, reader).read(13) - wanted).max() <= 3


def test_readers_agree_on_a_rotated_video(reader, steady, tmp_path):
    path = tmp_path / "rotated.mp4"
    with av.open(str(steady)) as source, av.open(str(path), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        stream.set_display_rotation(90)
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                target.mux(packet)
    upright = open_video(steady, "pyav").read(13)
    np.testing.assert_array_equal(open_video(path, reader).read(13), np.rot90(upright))


@pytest.mark.parametrize("codec, pixels", [("mpeg4", "yuv420p"), ("libx264", "yuv444p")])
def test_odd_sizes_are_read(reader, tmp_path, codec, pixels):
    options = X264 if codec == "libx264" else {}
    path = encode(tmp_path / "odd.mp4", STEADY[:14] // 20, codec, (97, 131), options, Fraction(1, 30), pixels)
    video, wanted = open_video(path, reader), open_video(path, "pyav")
    for index in (13, 0, 5):
        image = video.read(index)
        assert image.shape == (97, 131, 3) and number_in(image) == index
        # Libraries spread the colour of odd sizes differently at sharp edges.
        assert np.abs(image - wanted.read(index).astype(int)).mean() < 1.5


@pytest.mark.parametrize("codec", ["mpeg4", "av1", "libx265"])
def test_other_codecs_are_read_rightly_or_refused(reader, tmp_path, codec):
    if codec == "av1":
        path = VIDEOS / "av1_numbers.mp4"
    elif codec in av.codec.codecs_available:
        quick = {"x265-params": "log-level=none"} if codec == "libx265" else {}
        path = encode(tmp_path / "video.mp4", STEADY // 20, codec, options=quick, time_base=Fraction(1, 30))
    else:
        pytest.skip(f"no encoder {codec}")
    if reader == "decord" and codec != "mpeg4":
        with pytest.raises(DataError, match='decord.*use reader "pyav"'):
            open_video(path, reader).read(0)
    else:
        assert_frames_in_any_order(open_video(path, reader))


def test_sizes_that_a_library_gets_wrong_are_refused(reader, tmp_path):
    video = open_video(encode(tmp_path / "a.mp4", size=(32, 48)), reader)
    try:
        image = video.read(3)
    except DataError as error:
        assert reader == "decord" and error.rule == "video" and 'use reader "' in str(error)
    else:
        assert image.shape == (32, 48, 3) and number_in(image) == 3


def test_matroska_is_read(reader, tmp_path):
    assert_frames_in_any_order(open_video(encode(tmp_path / "video.mkv", UNEVEN), reader))


def test_frames_stored_behind_their_key_frame_are_never_taken_for_others(reader, tmp_path):
    path = with_open_groups(tmp_path / "open.mp4")
    if reader == "decord":
        with pytest.raises(DataError, match='store frames behind.*use reader "pyav"'):
            open_video(path, reader)
        return
    video = open_video(path, reader)
    for index in np.random.default_rng(0).permutation(NUM_FRAMES - 1):  # torchcodec cannot read the last one
        assert number_in(video.read(int(index))) == index
    if reader == "pyav":
        assert number_in(video.read(NUM_FRAMES - 1)) == NUM_FRAMES - 1


def test_frames_hidden_by_an_edit_list_do_not_count(reader, steady, tmp_path):
    data = bytearray(steady.read_bytes())
    entry = data.index(b"elst") + 12  # duration and first time of the one entry, 4 bytes each
    first = int.from_bytes(data[entry + 4 : entry + 8], "big")
    with av.open(str(steady)) as container:
        cut = round(17 / 30 / container.streams.video[0].time_base)
    data[entry + 4 : entry + 8] = (first + cut).to_bytes(4, "big")
    path = tmp_path / "cut.mp4"
    path.write_bytes(data)
    if reader != "pyav":
        with pytest.raises(DataError, match='edit list.*use reader "pyav"'):
            open_video(path, reader)
        return
    video = open_video(path, reader)
    assert video.times[0] == pytest.approx(0, abs=1e-6)
    assert [number_in(video.read(i)) for i in (5, 0, len(video) - 1)] == [22, 17, NUM_FRAMES - 1]


# -- damage -------------------------------------------------------------------------------------------------------


def one_line(error: pytest.ExceptionInfo) -> str:
    assert error.value.rule == "video" and "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("kept", [0.0, 0.3, 0.7, 0.99])
def test_a_cut_file_is_refused_when_opened(reader, steady, tmp_path, kept):
    data = steady.read_bytes()
    path = tmp_path / "cut.mp4"
    path.write_bytes(data[: int(kept * len(data))])
    with pytest.raises(DataError) as error:
        open_video(path, reader)
    assert one_line(error).startswith(f"{path}: is ")


def test_a_file_cut_between_two_frames_is_refused(reader, steady, tmp_path):
    path = tmp_path / "cut.mp4"
    path.write_bytes(steady.read_bytes()[: sum(packets(steady)[30])])
    with pytest.raises(DataError, match="cut short"):
        open_video(path, reader)


def test_files_that_are_no_videos_are_refused(reader, tmp_path):
    (tmp_path / "text.mp4").write_text("hello\n" * 100)
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=16000, layout="mono")
        samples = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        samples.rate = 16000
        container.mux([*stream.encode(samples), *stream.encode(None)])
    for name, what in {"text.mp4": "not a readable", "sound.mp4": "no video stream", "none.mp4": "no such"}.items():
        with pytest.raises(DataError, match=what) as error:
            open_video(tmp_path / name, reader)
        assert one_line(error).startswith(str(tmp_path / name))


def test_frames_that_do_not_decode_are_refused_and_the_others_still_right(reader, steady, tmp_path):
    data = bytearray(steady.read_bytes())
    for position, size in packets(steady)[26:29]:
        data[position : position + size] = bytes(size)
    path = tmp_path / "zeros.mp4"
    path.write_bytes(data)
    video = open_video(path, reader)
    refused = []
    for index in (30, 3, 28, 45, 29, 11, 40):
        try:
            assert number_in(video.read(index)) == index
        except DataError as error:
            assert f"frame {index} at {index / 30:.3f} s" in str(error) and "\n" not in str(error)
            refused.append(index)
    assert {28, 29, 30} <= set(refused) and not {3, 11, 40, 45} & set(refused)


def test_a_frame_marked_damaged_is_refused_with_those_built_on_it(steady, tmp_path):
    check_video(steady)
    damaged = 0
    for flipped in range(12):
        data = bytearray(steady.read_bytes())
        position, size = packets(steady)[25]  # the first frame after the key frame 24
        data[position + size - 1 - 2 * flipped] ^= 0xFF
        path = tmp_path / f"flip{flipped}.mp4"
        path.write_bytes(data)
        try:
            check_video(path)
        except DataError:
            damaged += 1
            video = open_video(path, "pyav")
            with pytest.raises(DataError):
                video.read(34)
            assert number_in(video.read(23)) == 23 and number_in(video.read(36)) == 36
    assert damaged >= 6  # the decoder does not notice every flipped bit


@pytest.mark.parametrize("seed", range(2))
def test_bytes_flipped_anywhere_end_in_frames_or_one_line(reader, steady, tmp_path, seed):
    """In a process of its own with a time limit: libraries crash and hang too."""
    rng = np.random.default_rng(seed)
    paths = []
    for number in range(12):
        data = bytearray(steady.read_bytes())
        for at in rng.integers(0, len(data), 8):
            data[at] ^= 0xFF
        paths.append(tmp_path / f"{number}.mp4")
        paths[-1].write_bytes(data)
    code = """
import sys
from data_utils.errors import DataError
from data_utils.video import open_video
for path in sys.argv[2:]:
    try:
        video = open_video(path, sys.argv[1])
    except DataError as error:
        assert "\\n" not in str(error)
        continue
    for index in (30, 3, 28, 45, len(video) - 1, 0):
        try:
            video.read(min(index, len(video) - 1))
        except DataError as error:
            assert "\\n" not in str(error)
"""
    done = subprocess.run([sys.executable, "-c", code, reader, *map(str, paths)], capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr.decode()[-2000:]


# -- libraries ----------------------------------------------------------------------------------------------------


def test_importing_the_readers_imports_no_video_library():
    code = "import sys, data_utils.video; print(*{'av', 'decord', 'torchcodec', 'torch'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True).stdout.strip() == ""


@pytest.mark.parametrize("missing", ["decord", "torchcodec"])
def test_a_missing_library_is_named_with_the_line_that_installs_it(steady, monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(DataError, match=rf"{missing}: .*pip install .*{missing}==\d"):
        open_video(steady, missing)


def test_an_unknown_reader_is_answered_with_the_known_ones(steady):
    for ask in (lambda: open_video(steady, "opencv"), lambda: VideoCache("opencv")):
        with pytest.raises(ValueError, match="opencv.*decord, torchcodec, pyav"):
            ask()


# -- the cache ----------------------------------------------------------------------------------------------------


def test_the_cache_returns_the_frame_nearest_in_time(reader, uneven):
    cache = VideoCache(reader)
    times = UNEVEN / 600
    for index in (0, 20, 21, 49):
        assert number_in(cache.frame(uneven, times[index])) == index
        assert number_in(cache.frame(str(uneven), times[index] + 0.4 * np.diff(times, append=9.0).min())) == index
    assert cache.span(uneven) == pytest.approx((times[0], times[-1], float(np.median(np.diff(times)))))
    cache.close()
    assert number_in(cache.frame(uneven, times[3])) == 3


def test_a_time_outside_the_video_is_refused(uneven):
    cache = VideoCache("pyav")
    first, last, step = cache.span(uneven)
    assert number_in(cache.frame(uneven, last + 0.7 * step)) == NUM_FRAMES - 1
    for time in (last + 0.8 * step, first - 0.8 * step, 0.0, float("nan")):
        with pytest.raises(DataError, match=f"near {time:.3f} s.* {first:.3f} to {last:.3f} s") as error:
            cache.frame(uneven, time)
        assert one_line(error).startswith(str(uneven))


def test_the_cache_checks_for_its_reader_without_decoding(tmp_path):
    path = with_open_groups(tmp_path / "open.mp4")
    assert VideoCache("pyav").span(path)
    pytest.importorskip("decord")
    with pytest.raises(DataError, match="decord"):
        VideoCache("decord").span(path)


@pytest.fixture(scope="module")
def many(tmp_path_factory) -> list[Path]:
    """Six videos of 14 frames; the first frame of the n-th shows the number n."""
    folder = tmp_path_factory.mktemp("many")
    paths = []
    for first in range(6):
        paths.append(folder / f"{first}.mp4")
        encode(paths[-1], STEADY[:14], size=(64 + 16 * first, 96))
    return paths


def open_files(paths) -> int:
    names = {str(path) for path in paths}
    links = [Path("/proc/self/fd") / name for name in os.listdir("/proc/self/fd")]
    return sum(os.readlink(link) in names for link in links if link.is_symlink())


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="counts open files in /proc")
def test_no_more_decoders_stay_open_than_allowed(reader, many):
    cache = VideoCache(reader, max_open=2)
    for _ in range(3):
        for path in many:
            cache.frame(path, 0.1)
            assert open_files(many) <= 2
    cache.close()
    assert open_files(many) == 0


def test_threads_decode_through_a_cache_smaller_than_their_number(reader, many):
    cache = VideoCache(reader, max_open=2)
    faults = []

    def work(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for _ in range(25):
            video, frame = int(rng.integers(len(many))), int(rng.integers(14))
            image = cache.frame(many[video], frame / 30)
            if number_in(image) != frame or image.shape != (64 + 16 * video, 96, 3):
                faults.append((video, frame))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not faults and not any(thread.is_alive() for thread in threads)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_process_reads_with_decoders_of_its_own(reader, many):
    code = """
import os, sys
import numpy as np
from data_utils.video import VideoCache, open_video
reader, first, second = sys.argv[1:]
cache, video = VideoCache(reader, max_open=2), open_video(second, reader)
wanted = [cache.frame(first, i / 30) for i in range(14)]
video.read(3)
children = []
for _ in range(2):
    pid = os.fork()
    if pid == 0:
        same = all((cache.frame(first, i / 30) == wanted[i]).all() for i in (7, 2, 13))
        video.read(9)
        cache.close()
        sys.exit(0 if same else 3)  # with the interpreter's usual end
    children.append(pid)
assert all((cache.frame(first, i / 30) == wanted[i]).all() for i in (5, 12, 0))
assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children] == [0, 0]
"""
    command = [sys.executable, "-W", "ignore", "-c", code, reader, str(many[0]), str(many[1])]
    done = subprocess.run(command, capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr.decode()[-2000:]


def test_a_pickled_cache_arrives_empty_and_usable(many):
    cache = VideoCache("pyav", max_open=3)
    cache.frame(many[0], 0.1)
    assert number_in(pickle.loads(pickle.dumps(cache)).frame(many[0], 0.1)) == 3


def test_the_index_of_a_large_video_is_read_once_ever(tmp_path, monkeypatch):
    from data_utils.video import index as video_index

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(video_index, "CACHED_FROM_BYTES", 0)
    path = encode(tmp_path / "a.mp4")
    first = video_index.read_index(path)
    stored = list((tmp_path / "cache").rglob("*.npz"))
    assert len(stored) == 1
    with monkeypatch.context() as patched:
        patched.setattr(video_index, "_demux", lambda path: pytest.fail("the packets are read again"))
        again = video_index.read_index(path)
    np.testing.assert_array_equal(again.times, first.times)
    assert (again.codec, again.hidden, again.frame_interval) == (first.codec, first.hidden, first.frame_interval)
    stored[0].write_bytes(b"not an archive")
    np.testing.assert_array_equal(video_index.read_index(path).times, first.times)
    encode(path, ticks=UNEVEN)
    np.testing.assert_array_equal(video_index.read_index(path).times, UNEVEN / 600)


def test_the_indexes_kept_in_memory_are_bounded(tmp_path, monkeypatch):
    from data_utils.video import cache as video_cache

    monkeypatch.setattr(video_cache, "MAX_INDEXED_FRAMES", 3 * NUM_FRAMES)
    cache = VideoCache("pyav", max_open=2)
    for number in range(6):
        assert number_in(cache.frame(encode(tmp_path / f"{number}.mp4"), 0.0)) == 0
    assert len(cache._state.indexes) == 3 and cache._state.indexed_frames == 3 * NUM_FRAMES
    cache.close()
