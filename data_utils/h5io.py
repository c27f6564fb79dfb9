"""Episode files: :class:`Episode` reads one, :func:`write_episode` and :class:`EpisodeWriter` make one."""

from data_utils.episodes.reader import Episode
from data_utils.episodes.recorder import EpisodeWriter
from data_utils.episodes.schema import SCHEMA_VERSION
from data_utils.episodes.writer import CameraData, EpisodeData, VideoFrames, seal, write_episode

__all__ = [
    "SCHEMA_VERSION",
    "CameraData",
    "Episode",
    "EpisodeData",
    "EpisodeWriter",
    "VideoFrames",
    "seal",
    "write_episode",
]
