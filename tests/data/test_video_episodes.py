"""Episodes whose frames stay in video files."""

from fractions import Fraction

import av
import numpy as np
import pytest

from data_utils.errors import DataError
from data_utils.h5io import CameraData, Episode, EpisodeData, VideoFrames, write_episode
from data_utils.samples.dataset import H5DatasetMapBase
from tests.data.episodes import CAMERAS, camera_pose, config, edited, poses

FPS = 10
K = np.array([[30.0, 0.0, 16.0], [0.0, 30.0, 12.0], [0.0, 0.0, 1.0]])


def grey(frame, camera):
    return 20 + 9 * frame + 4 * camera


def write_video(path, frames, camera=0):
    """Frame t is filled with ``grey(t, camera)``."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(FPS), options={"crf": "8", "g": "6"})
        stream.width, stream.height, stream.pix_fmt = 32, 24, "yuv420p"
        for t in range(frames):
            image = np.full((24, 32, 3), grey(t, camera), np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
    return path


def episode_data(frames=12, start=0.0, **changes):
    times = np.arange(frames) / FPS
    cameras = {
        camera: CameraData(camera_pose(c), K, VideoFrames(f"{camera}.mp4", times + start))
        for c, camera in enumerate(CAMERAS)
    }
    return EpisodeData(times, poses(times), np.full((frames, 1), 0.5), ["go"], cameras, **changes)


@pytest.fixture
def videos(tmp_path):
    folder = tmp_path / "videos"
    folder.mkdir()
    for c, camera in enumerate(CAMERAS):
        write_video(folder / f"{camera}.mp4", 24, c)
    return folder


def shown(episode, camera, index):
    return float(np.mean(episode.rgb(camera, index)))


@pytest.mark.parametrize("start", [0, 7])
def test_frames_come_from_the_time_in_the_video_that_the_episode_names(tmp_path, videos, start):
    write_episode(tmp_path / "a.h5", episode_data(start=start / FPS, video_root="videos"))
    with Episode(tmp_path / "a.h5") as episode:
        for c, camera in enumerate(CAMERAS):
            for index in (0, 5, 11):
                assert shown(episode, camera, index) == pytest.approx(grey(start + index, c), abs=2)


def test_without_times_of_their_own_videos_run_with_the_timestamps(tmp_path, videos):
    path = tmp_path / "a.h5"
    write_episode(path, episode_data(start=0.4, video_root="videos"))
    with edited(path) as file:
        del file["front/video_time"], file.attrs["schema_version"]
    with Episode(path) as episode:
        assert shown(episode, "front", 3) == pytest.approx(grey(3, 0), abs=2)
        assert shown(episode, "wrist", 3) == pytest.approx(grey(7, 1), abs=2)


def test_a_video_root_that_is_given_overrides_the_files(tmp_path, videos):
    write_episode(tmp_path / "a.h5", episode_data(video_root="/nowhere"))
    with Episode(tmp_path / "a.h5") as episode, pytest.raises(DataError, match=r"front/rgb at frame 0.*/nowhere") as e:
        episode.rgb("front", 0)
    assert e.value.rule == "video"
    with Episode(tmp_path / "a.h5", video_root=str(videos)) as episode:
        assert shown(episode, "front", 2) == pytest.approx(grey(2, 0), abs=2)


def test_a_video_shorter_than_its_timestamps_is_refused(tmp_path, videos):
    write_episode(tmp_path / "a.h5", episode_data(frames=12, start=1.5, video_root="videos"))
    with Episode(tmp_path / "a.h5") as episode:
        episode.rgb("front", 8)
        with pytest.raises(DataError, match=r"a\.h5: front/rgb at frame 10: .*front\.mp4") as caught:
            episode.rgb("front", 10)
    assert caught.value.rule == "video"


def test_samples_of_videos_carry_everything_a_jpeg_sample_does(tmp_path, videos):
    write_episode(tmp_path / "a.h5", episode_data(video_root="videos"))
    sample = H5DatasetMapBase([tmp_path / "a.h5"], config(), train=False).sample(0, np.random.default_rng(0), frame=6)
    assert sample.rgb.shape == (1, 2, 3, 32, 32) and sample.mask[0, 0].sum() == 24 * 32
    assert sample.rgb[0, 1, :, 16, 16] == pytest.approx(grey(6, 1), abs=2)
