"""Which folders and episode files a place has now, looking again only at folders that changed."""

from __future__ import annotations

import glob
import os
import time

from data_utils.data_loc import is_episode_name, list_folder

SETTLED_NS = 2_000_000_000  # a folder changed less than this ago may change again without a new time

FileStatus = tuple[str, int, int]  # name, size, mtime_ns


def static_folder(pattern: str) -> str:
    """The longest leading folder of a file's path or a glob that holds no wildcard."""
    folder = os.path.dirname(pattern)
    while glob.has_magic(folder):
        folder = os.path.dirname(folder)
    return folder


def file_status(path: str, name: str) -> list[FileStatus]:
    """(name, size, mtime_ns) of a file, nothing where it has just been removed."""
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return []
    return [(name, status.st_size, status.st_mtime_ns)]


def scan(path: str, root: str, known: dict[str, int]) -> tuple[dict[str, int], dict[str, list[FileStatus]]]:
    """Look at a place.

    Args:
        path: absolute, a folder, a file or a glob.
        root: the folder itself, or :func:`static_folder` of the others.
        known: modification times of folders, as an earlier call returned them.
    Returns:
        the modification time of every folder, by its path relative to ``root``; and the episode files of those whose
        time is another one than ``known``.
    Raises:
        OSError: a folder cannot be listed.
    """
    return _scan_folder(root, known) if path == root else _scan_glob(path, root, known)


def _scan_folder(root: str, known: dict[str, int]) -> tuple[dict[str, int], dict[str, list[FileStatus]]]:
    children: dict[str, list[str]] = {}
    for folder in known:
        if folder:
            children.setdefault(os.path.dirname(folder), []).append(folder)
    folders: dict[str, int] = {}
    listed: dict[str, list[FileStatus]] = {}
    waiting: list[tuple[str, frozenset[int]]] = [("", frozenset())]
    while waiting:
        folder, above = waiting.pop()
        status = os.stat(os.path.join(root, folder))
        if status.st_ino in above:  # a link to a folder it lies in
            continue
        folders[folder] = _settled(status.st_mtime_ns)
        below = above | {status.st_ino}
        if known.get(folder) == status.st_mtime_ns:
            waiting += [(child, below) for child in children.get(folder, ())]
            continue
        subfolders, names = list_folder(os.path.join(root, folder))
        waiting += [(os.path.join(folder, name), below) for name in subfolders]
        listed[folder] = [found for name in names for found in file_status(os.path.join(root, folder, name), name)]
    return folders, listed


def _scan_glob(path: str, root: str, known: dict[str, int]) -> tuple[dict[str, int], dict[str, list[FileStatus]]]:
    names: dict[str, list[str]] = {}
    for item in [path] if os.path.isfile(path) else glob.glob(path, recursive=True):
        folder, name = os.path.split(item)
        if item == path or is_episode_name(name):
            names.setdefault(os.path.relpath(folder, root).removeprefix("."), []).append(name)
    folders, listed = {}, {}
    for folder, found in names.items():
        mtime_ns = os.stat(os.path.join(root, folder)).st_mtime_ns
        folders[folder] = _settled(mtime_ns)
        if known.get(folder) != mtime_ns:
            listed[folder] = [
                status for name in found for status in file_status(os.path.join(root, folder, name), name)
            ]
    return folders, listed


def _settled(mtime_ns: int) -> int:
    """The time to remember for a folder; -1, which is no folder's, while it may still change unnoticed."""
    return mtime_ns if mtime_ns < time.time_ns() - SETTLED_NS else -1
