"""Episode files, both directions: :class:`Episode` reads one, :class:`EpisodeWriter` records one."""

from data_utils.h5reader import JPEG_CHANNELS_ATTR, SCHEMA_VERSION, Episode
from data_utils.h5writer import EpisodeWriter

__all__ = ["JPEG_CHANNELS_ATTR", "SCHEMA_VERSION", "Episode", "EpisodeWriter"]
