"""What a checking process finds out about one file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict

import h5py

from data_utils.checks.checker import Report, Request
from data_utils.checks.contents import read_contents
from data_utils.checks.faults import find_faults
from data_utils.checks.unusual import find_warnings
from data_utils.errors import DataError, Fault
from data_utils.h5io import Episode
from data_utils.video import VideoCache


def inspect_file(request: Request, at: Callable[[str], None]) -> Report:
    """Check one file in this process; ``at(place)`` is told of every frame before it is read."""
    if request.depth in ("deep", "sampled"):
        return _examine_file(request, at)

    def read(cameras: Sequence[str] | None) -> Report:
        with Episode(request.path, cameras, request.video_root) as episode:
            _read_small_arrays(episode)
            if request.depth == "frames":
                for camera in episode.cameras:
                    for index in range(len(episode)):
                        at(f"{camera} frame {index}")
                        episode.rgb(camera, index)
                        episode.mask(camera, index)
            return Report(len(episode), episode.num_ee, episode.prompts[0], episode.cameras)

    try:
        return read(None)
    except DataError as error:
        fault = error
    try:
        whole = read(())
        names = _camera_names(request.path)
    except (DataError, OSError, RuntimeError):
        return Report(rule=fault.rule, message=str(fault))
    camera_faults = {}
    for name in names:
        try:
            read((name,))
        except DataError as error:
            camera_faults[name] = Fault(error.rule, str(error))
    if not camera_faults:  # what is wrong is in none of the parts
        return Report(rule=fault.rule, message=str(fault))
    return Report(whole.length, whole.num_ee, whole.prompt, tuple(names), camera_faults=camera_faults)


def _examine_file(request: Request, at: Callable[[str], None]) -> Report:
    path, root, videos = request.path, request.video_root, VideoCache("pyav", max_open=2)
    wanted = request.ee_indices or None
    faults = find_faults(path, request.cameras, root, videos, request.depth == "deep", wanted, at)
    at("contents")
    try:
        contents = read_contents(path, videos, root)
    except DataError as error:
        if not faults:
            raise AssertionError(f"{path} passed every check, yet cannot be read: {error}") from error
        return Report(faults=tuple(faults))
    at("warnings")
    warnings = [] if faults else find_warnings(path, videos, root)
    videos.close()
    return Report(
        length=contents.frames,
        num_ee=contents.num_ee,
        prompt=contents.prompts[0],
        cameras=tuple(contents.cameras),
        faults=tuple(faults),
        warnings=tuple(warnings),
        contents=asdict(contents),
    )


def _read_small_arrays(episode) -> None:
    """Read what checks itself when it is first read."""
    for name in ("timestamps", "world_from_ee", "gripper", "world_from_ee_desired", "gripper_desired", "ee_indices"):
        getattr(episode, name)
    for camera in episode.cameras:
        episode.world_from_cam(camera, 0)
        episode.K(camera, 0)
        if episode.is_video(camera):
            episode.video_location(camera, 0)
    _ = episode.subtasks


def _camera_names(path: str) -> list[str]:
    with h5py.File(path, "r") as file:
        return [name for name, item in file.items() if isinstance(item, h5py.Group) and "rgb" in item]
