"""What parts of an inspection (``data_utils.shards``) have found, beside ``--json`` until the whole takes it up."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from data_utils.errors import DataError
from data_utils.files import read_json, write_json
from data_utils.index.scan import file_status
from data_utils.inspect.inspected import Inspected
from data_utils.shards import Shard


def part_file(json_file: Path, shard: Shard) -> Path:
    """Of ``report.json``: ``report.0_of_4.json``."""
    return json_file.with_name(f"{json_file.stem}{shard.suffix}{json_file.suffix}")


def part_files(json_file: Path) -> list[Path]:
    """Those that are there."""
    return sorted(json_file.parent.glob(f"{json_file.stem}.*_of_*{json_file.suffix}"))


def write_part(file: Path, settings: Mapping[str, Any], found: Iterable[Inspected]) -> None:
    """``settings``: what was asked (JSON-able)."""
    episodes = [{**dataclasses.asdict(item), "state": _state(item.path)} for item in found]
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, {"settings": dict(settings), "episodes": episodes})


def read_part(file: Path, settings: Mapping[str, Any]) -> dict[str, Inspected]:
    """By path, of the files that are still as they were.

    Raises:
        DataError: something else was asked of it, or it is no part's file.
    """
    try:
        values = read_json(file)
        if values["settings"] == json.loads(json.dumps(settings)):
            episodes = [item for item in values["episodes"] if item.pop("state") == _state(item["path"])]
            return {item["path"]: Inspected.from_dict(item) for item in episodes}
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{file} is not what a part has left ({error}); remove it", "file") from error
    raise DataError(f"{file} is of a part that was asked with other flags; use those, or remove it", "file")


def _state(path: str) -> list[int]:
    return [number for _, *numbers in file_status(path, path) for number in numbers]
