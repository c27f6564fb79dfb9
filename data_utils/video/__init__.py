"""What does a video file show at a time?

Imports ``data_utils.errors`` and ``files``; others import what is named here.
"""

from data_utils.video.cache import READERS, TOLERANCE, VideoCache, check_video, nearest_frame, open_video

__all__ = ["READERS", "TOLERANCE", "VideoCache", "check_video", "nearest_frame", "open_video"]
