"""What converted episodes were made from, so that a conversion that goes on notices a source that has changed."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path

from data_utils.files import write_text

FILE = "sources{}.jsonl"  # in the output folder, {}: a part's suffix; a line per episode, the last one counts


class Provenance:
    """The record of an output folder.

    Args:
        suffix: of the part (``data_utils.shards``) that this process converts, whose own file it writes.
    """

    def __init__(self, out: Path, suffix: str = "") -> None:
        self._out, self._path = out, out / FILE.format(suffix)
        self._made_from: dict[str, object] = {}
        for file in (out / FILE.format(""), *self._of_parts()):
            for line in file.read_text(encoding="utf-8").split("\n") if file.is_file() else ():
                try:
                    entry = json.loads(line)
                    self._made_from[entry["episode"]] = entry["made_from"]
                except (ValueError, KeyError, TypeError):  # the end of a run that was killed
                    continue

    def merge(self) -> None:
        """Put what parts have left into the one file; for whoever writes there alone."""
        if parts := self._of_parts():
            entries = ({"episode": episode, "made_from": made_from} for episode, made_from in self._made_from.items())
            write_text(self._path, "".join(json.dumps(entry) + "\n" for entry in entries))
            for part in parts:
                part.unlink()

    def _of_parts(self) -> list[Path]:
        return sorted(self._out.glob(FILE.format(".*_of_*")))

    def is_current(self, episode: str, made_from: object) -> bool:
        """Whether an episode that is there is of this source. Folders of earlier versions say nothing: theirs are."""
        return not self._made_from or self._made_from.get(episode) == json.loads(json.dumps(made_from))

    def add(self, episode: str, made_from: object) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"episode": episode, "made_from": made_from}) + "\n")


def state_of(paths: Iterable[str | Path]) -> dict[str, list[int] | None]:
    """Size and time of change, in ns, of files; None for one that is not there, which reading it will say."""
    state: dict[str, list[int] | None] = {}
    for path in dict.fromkeys(map(str, paths)):
        try:
            found = os.stat(path)
            state[path] = [found.st_size, found.st_mtime_ns]
        except OSError:
            state[path] = None
    return state
