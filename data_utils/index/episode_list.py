"""The episodes a dataset reads, as a few arrays: a hundred thousand of them stay small in every loader worker."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data_utils.data_loc import Location
from data_utils.errors import UnusableEpisode
from data_utils.index.episode_index import EpisodeIndex, check_paths


class EpisodeList(Sequence[str]):
    """Paths of usable episodes, sorted, and what the index knows of each.

    Attributes:
        lengths: (N,) int32 frames of each episode.
        faults: the episodes that are left out.
    """

    def __init__(
        self,
        rows: pa.Table,
        folders: Sequence[str | None],
        video_roots: Sequence[str | None],
        faults: list[UnusableEpisode],
    ) -> None:
        self._paths = rows["path"].combine_chunks()
        self._status = np.stack([rows["size"].to_numpy(), rows["mtime_ns"].to_numpy()], axis=1)  # (N, 2)
        self._location = rows["location"].to_numpy()  # into _folders and _video_roots
        self._folders, self._video_roots = list(folders), list(video_roots)
        self.lengths = rows["length"].to_numpy()
        self.faults = faults

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> str:
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        return os.fsdecode(self._paths[index % len(self)].as_py())

    def __iter__(self) -> Iterator[str]:
        return (os.fsdecode(path.as_py()) for path in self._paths)

    @property
    def num_listed(self) -> int:
        """Episodes there are, usable or not."""
        return len(self) + len(self.faults)

    def video_root(self, index: int) -> str | None:
        """Folder of the videos of an episode; None: what its file says."""
        return self._video_roots[self._location[index]]

    def name(self, index: int) -> str:
        """Path of an episode below its location; of a file that was named by itself, its own name."""
        path, folder = self[index], self._folders[self._location[index]]
        return os.path.basename(path) if folder is None else os.path.relpath(path, folder)

    def only(self, chosen: np.ndarray) -> "EpisodeList":
        """The episodes that are ``chosen`` (N,) bool; what was left out already is not listed again."""
        part = copy.copy(self)
        part._paths = self._paths.filter(pa.array(chosen))
        part._status, part._location = self._status[chosen], self._location[chosen]
        part.lengths, part.faults = self.lengths[chosen], []
        return part

    def is_unchanged(self, index: int) -> bool:
        """Whether the file is still the one that was checked, by its size and time."""
        try:
            status = os.stat(self[index])
        except OSError:
            return False
        return (status.st_size, status.st_mtime_ns) == tuple(self._status[index].tolist())


def list_episodes(
    source: Sequence[Location] | Sequence[str | os.PathLike], cameras: Sequence[str], first_half: bool = False
) -> EpisodeList:
    """The episodes of some locations, by their indexes, or files named one by one, which are checked now.

    Args:
        source: where the episodes are.
        cameras: cameras that each must have.
        first_half: take the first half of the sorted episodes, the faulty ones counted.
    Raises:
        DataError: a location without episodes.
    """
    if all(isinstance(item, Location) for item in source):
        indexes = [EpisodeIndex(location.path) for location in source]
        tables, folders = [index.episodes for index in indexes], [index.root for index in indexes]
        video_roots = [location.video_root for location in source]
    else:
        tables, folders, video_roots = [check_paths(source)], [None], [None]
    numbered = [
        table.append_column("location", pa.array(np.full(len(table), number, np.int16)))
        for number, table in enumerate(tables)
    ]
    rows = pa.concat_tables(numbered)
    rows = rows.take(pc.sort_indices(rows["path"]))
    paths = rows["path"].combine_chunks()
    if len(tables) > 1:  # locations may overlap
        rows = rows.filter(pa.concat_arrays([pa.array([True]), pc.not_equal(paths[1:], paths[:-1])]))
    if first_half:
        rows = rows.slice(0, (len(rows) + 1) // 2)
    faults = _faults(rows, tuple(cameras))
    usable = np.ones(len(rows), bool)
    usable[list(faults)] = False
    return EpisodeList(rows.filter(pa.array(usable)), folders, video_roots, list(faults.values()))


def _faults(rows: pa.Table, cameras: tuple[str, ...]) -> dict[int, UnusableEpisode]:
    """Row -> fault of every episode that cannot be used with these cameras."""
    # A dataset has a handful of camera lists, and few faults: only rows where something is wrong are looked at.
    lists = rows["cameras"].combine_chunks().dictionary_encode()
    there = [json.loads(text) for text in lists.dictionary.to_pylist()]
    missing = [[camera for camera in cameras if camera not in names] for names in there]
    lacks = np.array([bool(names) for names in missing], bool)[lists.indices.to_numpy()]
    wrong = pc.not_equal(rows["rule"], "").to_numpy() | pc.not_equal(rows["camera_faults"], "").to_numpy() | lacks
    faults = {}
    for row in np.flatnonzero(wrong).tolist():
        path = os.fsdecode(rows["path"][row].as_py())
        in_cameras = json.loads(rows["camera_faults"][row].as_py() or "{}")
        if rows["rule"][row].as_py():
            faults[row] = UnusableEpisode(path, rows["rule"][row].as_py(), _at(path, rows["message"][row].as_py()))
        elif lacks[row]:
            kind = lists.indices[row].as_py()
            what = f"{' and '.join(missing[kind])} camera is missing; the file has {', '.join(there[kind]) or 'none'}"
            faults[row] = UnusableEpisode(path, "camera", f"{path}: {what}")
        else:
            used = [fault for camera, fault in in_cameras.items() if camera in cameras]
            if used:
                faults[row] = UnusableEpisode(path, used[0][0], _at(path, used[0][1]))
    return faults


def _at(path: str, message: str) -> str:
    """A message of the index, which may have been built where the data had another name."""
    return message if path in message else f"{path}: {message}"
