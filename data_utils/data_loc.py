"""Where datasets are on this machine: dataset name -> folders of episodes, from a YAML file of per-host blocks.

Nothing is read when this module is imported.
"""

from __future__ import annotations

import glob
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from data_utils.errors import DataError
from data_utils.yaml_file import YamlFile, read_yaml

LOCATION_VARIABLE = "APT_DATA_LOC"
HOST_VARIABLE = "APT_DATA_LOC_HOST"
EPISODE_SUFFIXES = (".h5", ".hdf5")
DEFAULT_BLOCK = "default"
_TRACKED, _LOCAL = "data_loc.yaml", "data_loc.local.yaml"


@dataclass(frozen=True)
class Location:
    """A place of episodes.

    Args:
        path: absolute path of a folder (searched with its sub-folders), a file, or a glob.
        video_root: folder of the videos that its episodes refer to; None: what each episode says.
    """

    path: str
    video_root: str | None = None


def is_episode_name(name: str) -> bool:
    """Whether a file of that name is an episode: hidden ones are somebody's temporary files."""
    return name.endswith(EPISODE_SUFFIXES) and not name.startswith(".")


def get_ipv4_address() -> str:
    """This machine's IPv4 address, or what ``APT_DATA_LOC_HOST`` says; 127.0.0.1 on a machine without a network."""
    if os.environ.get(HOST_VARIABLE):
        return os.environ[HOST_VARIABLE]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("10.255.255.255", 1))  # chooses the outgoing interface; a datagram socket sends nothing
        except OSError:
            return "127.0.0.1"
        return probe.getsockname()[0]


def location_file() -> Path:
    """The YAML file that counts: ``APT_DATA_LOC``, else ``data_loc.local.yaml``, else ``data_loc.yaml``.

    Raises:
        DataError: ``APT_DATA_LOC`` names a file that is not there.
    """
    named = os.environ.get(LOCATION_VARIABLE)
    if named:
        path = Path(named).expanduser()
        if not path.is_file():
            raise DataError(
                f"{LOCATION_VARIABLE} names {path}, which is not a file; correct it or unset it", "location"
            )
        return path
    here = Path(__file__).parent
    local = here / _LOCAL
    return local if local.is_file() else here / _TRACKED


def locate(name: str) -> list[Location]:
    """Where the episodes of the dataset called ``name`` are; every place holds at least one.

    Raises:
        DataError: the file has no entry for the name, or the entry matches no episodes; says which file was read and
            what to add.
    """
    source = location_file()
    file = _read(source)
    blocks = {str(host): block or {} for host, block in (file.value or {}).items()}
    host = get_ipv4_address() if set(blocks) - {DEFAULT_BLOCK} else DEFAULT_BLOCK
    for block in _blocks_for(host, blocks):
        if name in blocks[block]:
            return entry_locations(name, blocks[block][name], file.at(f"{block}.{name}"), source.parent)
    raise DataError(
        f"dataset {name} has no location: {source} has no entry for it (host {host}); add under '{DEFAULT_BLOCK}:' a "
        f"line '{name}: /folder/of/episodes' (a relative path counts from the file's folder) in {_to_edit(source)}",
        "location",
    )


def _to_edit(source: Path) -> str:
    """The file that a user should write to: never the one that is under version control."""
    if source.name != _TRACKED or source.parent != Path(__file__).parent:
        return str(source)
    return f"{source.parent / _LOCAL}, which then counts instead, or a file that {LOCATION_VARIABLE} names"


def _read(source: Path) -> YamlFile:
    """The file, a mapping from hosts to mappings from names, or nothing."""
    try:
        file = read_yaml(source)
    except ValueError as error:
        raise DataError(f"{error}; correct it", "location") from error
    if not isinstance(file.value, dict | None):
        what = f"holds a {type(file.value).__name__}; wanted host blocks, such as '{DEFAULT_BLOCK}:'"
        raise DataError(f"{source} {what}", "location")
    for host, block in (file.value or {}).items():
        if not isinstance(block, dict | None):
            raise DataError(
                f"{file.at(str(host))}: block {host!r} is not a mapping from dataset names to paths; lines such as "
                f"'{host}: {block}' go below '{DEFAULT_BLOCK}:', or below the address of a host",
                "location",
            )
    return file


def _blocks_for(host: str, blocks: dict[str, dict]) -> list[str]:
    """Block names that apply to ``host``, the closest first: exact, longest prefix, default."""
    matching = [block for block in blocks if block != DEFAULT_BLOCK and host.startswith(block)]
    # "10.0.0.1" must not claim 10.0.0.12: a prefix ends at a dot, or is the whole address.
    matching = [block for block in matching if block == host or block.endswith(".") or host[len(block)] == "."]
    return sorted(matching, key=len, reverse=True) + ([DEFAULT_BLOCK] if DEFAULT_BLOCK in blocks else [])


def entry_locations(name: str, entry, line: str, folder: Path) -> list[Location]:
    """The places that an entry of a YAML file names; every one holds at least one episode.

    Args:
        line: where the entry was read, for messages; folder: what relative paths count from.
    Raises:
        DataError: an entry that cannot be meant, or matches no episodes.
    """
    locations = []
    for item in entry if isinstance(entry, list) and entry else [entry]:
        values = {"path": item} if isinstance(item, str) else item
        known = isinstance(values, dict) and "path" in values and set(values) <= {"path", "video_root"}
        if not known or not all(isinstance(value, str) and value for value in values.values()):
            raise DataError(
                f"{line}: entry {name} is {entry!r}; wanted a folder, file or glob, a mapping with 'path' and "
                "'video_root', or a list of these",
                "location",
            )
        absolute = {key: os.path.expandvars(os.path.expanduser(value)) for key, value in values.items()}
        absolute = {key: os.path.abspath(folder / value) for key, value in absolute.items()}
        if next(episode_files(absolute["path"]), None) is None:
            raise DataError(
                f"dataset {name}: {absolute['path']} (from {line}) matches no episode files "
                f"(*{', *'.join(EPISODE_SUFFIXES)}); correct the entry or put the data there",
                "location",
            )
        locations.append(Location(**absolute))
    return locations


def list_folder(folder: str) -> tuple[list[str], list[str]]:
    """Names of the sub-folders and of the episode files of one folder, as every walk over episodes sees them.

    Links are followed; hidden files and folders are passed over.
    """
    subfolders, files = [], []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                subfolders.append(entry.name)
            elif is_episode_name(entry.name):
                files.append(entry.name)
    return subfolders, files


def episode_files(path: str) -> Iterator[str]:
    """Episode files of a folder and its sub-folders, of a glob, or the file itself, as they are found.

    Raises:
        DataError: a folder cannot be listed.
    """
    if os.path.isdir(path):
        yield from _below(path, frozenset())
    elif os.path.isfile(path):
        yield path
    else:
        yield from (item for item in glob.iglob(path, recursive=True) if is_episode_name(os.path.basename(item)))


def find_episodes(path: str | os.PathLike, otherwise: str) -> list[str]:
    """:func:`episode_files`, sorted.

    Args:
        otherwise: what to do where there are none, to end the message.
    Raises:
        DataError: there are none, or a folder cannot be listed.
    """
    files = sorted(episode_files(os.fspath(path)))
    if not files:
        raise DataError(f"{path}: holds no episode files (*{', *'.join(EPISODE_SUFFIXES)}); {otherwise}", "location")
    return files


def _below(folder: str, above: frozenset[int]) -> Iterator[str]:
    try:
        inode = os.stat(folder).st_ino
        if inode in above:  # a link to a folder it lies in
            return
        subfolders, files = list_folder(folder)
    except OSError as error:
        raise DataError(f"{folder} cannot be listed ({error.strerror}); check its permissions", "location") from error
    yield from (os.path.join(folder, name) for name in files)
    for name in subfolders:
        yield from _below(os.path.join(folder, name), above | {inode})
