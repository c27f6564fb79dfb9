"""Episode files: :class:`Episode` reads one, :func:`write_episode` and :class:`EpisodeWriter` make one."""

from data_utils.h5reader import Episode
from data_utils.h5recorder import EpisodeWriter
from data_utils.h5writer import CameraData, EpisodeData, VideoFrames, seal, write_episode
from data_utils.schema import SCHEMA_VERSION

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
