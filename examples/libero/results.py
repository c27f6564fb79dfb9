"""A suite's results on disk: a CSV of outcomes and a JSON of what they depend on, whole at every moment.

``<folder>/<model>.csv`` has rows ``task_id, episode_id, success, prompt`` in the order of tasks and episodes, whatever
order they finish in, and a last row with the mean. ``<model>.json`` beside it has the settings, and what else is known
of each episode. Both are replaced, never written into: a kill at any moment loses at most the episodes in flight.

A part of a run (``data_utils.shards``) writes files of its own, ``<model>.0_of_4.csv``, which a whole run takes up.
"""

from __future__ import annotations

import csv
import fcntl
import io
import json
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_utils.files import write_json, write_text
from data_utils.shards import Shard
from data_utils.words import describe_differences, one_line

COLUMNS = ("task_id", "episode_id", "success", "prompt")
MEAN = "mean"


class ResultsError(ValueError):
    """Results that cannot be read or gone on with; the message is one line that says what to do."""


@dataclass(frozen=True)
class Row:
    task_id: int
    episode_id: int
    success: bool
    prompt: str

    @property
    def key(self) -> tuple[int, int]:
        return self.task_id, self.episode_id


class SuiteResults:
    """Results of one model on one suite, gone on with where they are there already. A context manager.

    Args:
        folder: of the suite.
        model: stem of the files.
        settings: what the outcomes depend on (JSON-able); a continued run must have the same.
        about: what else to write down.
        conti: False: begin anew; files that are there are moved aside.
        shard: the part that is run, beside others; None: the whole, alone.
    Raises:
        ResultsError: the files are another run's: of other settings, damaged, or being written right now.
    """

    def __init__(
        self,
        folder: Path,
        model: str,
        settings: Mapping[str, Any],
        about: Mapping[str, Any],
        conti: bool = True,
        shard: Shard | None = None,
    ) -> None:
        if not model or model != Path(model).name or model.startswith("."):
            raise ResultsError(f"--model_name {model!r} cannot name a file; use letters, digits, - and _")
        part = "" if shard is None else shard.suffix
        self.csv_file, self.json_file = folder / f"{model}{part}.csv", folder / f"{model}{part}.json"
        self._settings, self._about = json.loads(json.dumps(settings)), dict(about)
        self.rows: dict[tuple[int, int], Row] = {}
        self._extras: dict[tuple[int, int], dict] = {}
        self._seconds_before, self._opened = 0.0, time.monotonic()
        with ExitStack() as locks:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                # The whole is written alone, a part beside other parts.
                modes = {"": fcntl.LOCK_SH, part: fcntl.LOCK_EX} if part else {"": fcntl.LOCK_EX}
                for name, mode in modes.items():
                    lock = locks.enter_context(open(folder / f".{model}{name}.lock", "w"))
                    fcntl.flock(lock, mode | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ResultsError(f"{self.csv_file}: another run is writing there; wait for it, or stop it") from None
            except OSError as error:
                raise ResultsError(f"{folder}: cannot be written to ({error.strerror}); choose --save_root") from error
            parts = [] if part else [file for file in folder.glob(f"{model}.*.csv") if _is_part(file)]
            if not conti:
                self._move_aside([self.csv_file, *parts])
            elif part:
                self._read(self.csv_file)
                self._read(folder / f"{model}.csv")
            else:
                self._read(self.csv_file)
                self._take_up(parts)
            self._locks = locks.pop_all()

    def __contains__(self, key: tuple[int, int]) -> bool:
        return key in self.rows

    def add(self, row: Row, **extras: Any) -> None:
        """An episode's outcome, on disk when this returns, and what else is known of it (JSON-able)."""
        self.rows[row.key] = row
        self._extras[row.key] = extras
        self.write()

    def write(self) -> None:
        # The JSON first: an episode counts once the CSV has it, and is run again until then.
        write_json(self.json_file, self._record())
        write_text(self.csv_file, format_rows(self.rows))

    def __enter__(self) -> "SuiteResults":
        return self

    def __exit__(self, *exception) -> None:
        self._locks.close()

    def _record(self) -> dict[str, Any]:
        episodes = [
            {"task_id": key[0], "episode_id": key[1], **self._extras[key]} for key in sorted(self._extras.keys())
        ]
        return {
            "settings": self._settings,
            **self._about,
            "episodes_done": len(self.rows),
            "successes": sum(row.success for row in self.rows.values()),
            "wall_seconds": round(self._seconds_before + time.monotonic() - self._opened, 1),
            "episodes": episodes,
        }

    def _take_up(self, parts: list[Path]) -> None:
        """What parts have left is in the whole's files alone then."""
        for file in parts:
            self._read(file)
        if parts:
            self.write()
        for file in parts:
            for name in (file, file.with_suffix(".json"), file.with_name(f".{file.stem}.lock")):
                name.unlink(missing_ok=True)

    def _read(self, csv_file: Path) -> None:
        if not csv_file.exists():
            return
        rows, record = read_results(csv_file)
        if differing := describe_differences(record["settings"], self._settings):
            raise ResultsError(
                f"{csv_file}: was begun with other settings ({differing}); use those, keep both apart "
                "with --save_root or --suffix, or begin anew: --no-conti"
            )
        if rows.keys() - self.rows.keys():  # else: of a part that was taken up before
            self._seconds_before += record.get("wall_seconds", 0.0)
        extras = {
            (episode.pop("task_id"), episode.pop("episode_id")): episode
            for episode in map(dict, record.get("episodes", ()))
        }
        # Killed between the two files: the CSV lacks an episode that the JSON knows.
        self._extras |= {key: value for key, value in extras.items() if key in rows}
        self.rows |= rows

    @staticmethod
    def _move_aside(csv_files: list[Path]) -> None:
        files = [file for csv_file in csv_files for file in (csv_file, csv_file.with_suffix(".json"))]
        number = 1
        while any(_numbered(file, number).exists() for file in files):
            number += 1
        for file in files:
            if file.exists():
                file.rename(_numbered(file, number))


def read_results(csv_file: Path) -> tuple[dict[tuple[int, int], Row], dict[str, Any]]:
    """Outcomes by ``(task_id, episode_id)`` and the JSON record beside them.

    A last line that is cut short, as a power failure may leave it, is left out.

    Raises:
        ResultsError: a file is missing or holds something else.
    """
    json_file = csv_file.with_suffix(".json")
    try:
        rows = _parsed(csv_file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ResultsError(
            f"{csv_file}: holds no results ({error}); move it away, or begin anew: --no-conti"
        ) from error
    try:
        record = json.loads(json_file.read_text(encoding="utf-8"))
        if not isinstance(record, dict) or not isinstance(record.get("settings"), dict):
            raise ValueError("no settings in it")
    except (OSError, ValueError) as error:
        raise ResultsError(
            f"{json_file}: does not tell the settings of {csv_file.name} ({error}); begin anew: --no-conti"
        ) from error
    return rows, record


def format_rows(rows: Mapping[tuple[int, int], Row]) -> str:
    """The CSV of these rows."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    ordered = [rows[key] for key in sorted(rows)]
    for row in ordered:
        writer.writerow([row.task_id, row.episode_id, int(row.success), one_line(row.prompt, None)])
    mean = sum(row.success for row in ordered) / len(ordered) if ordered else 0.0
    writer.writerow([MEAN, len(ordered), f"{mean:.6f}", ""])
    return text.getvalue()


def _parsed(text: str) -> dict[tuple[int, int], Row]:
    lines = text.split("\n")
    torn = lines.pop() != ""  # nothing follows the last line's end
    if lines[:1] != [",".join(COLUMNS)]:
        if torn and not lines:
            return {}  # cut within the header
        raise ValueError(f"the first line is not {','.join(COLUMNS)}")
    rows: dict[tuple[int, int], Row] = {}
    for number, line in enumerate(lines[1:], 2):
        if line.startswith(f"{MEAN},"):
            continue
        try:
            (task, episode, success, prompt), *_ = csv.reader([line], strict=True)
            row = Row(int(task), int(episode), {"0": False, "1": True}[success], prompt)
        except (csv.Error, ValueError, KeyError):
            raise ValueError(f"line {number} is not task_id,episode_id,success,prompt: {line[:60]!r}") from None
        if row.key in rows:
            raise ValueError(f"line {number}: task {row.task_id} episode {row.episode_id} a second time")
        rows[row.key] = row
    return rows


def _is_part(csv_file: Path) -> bool:
    return re.fullmatch(r"\.\d+_of_\d+", Path(csv_file.stem).suffix) is not None


def _numbered(path: Path, number: int) -> Path:
    return path.with_name(f"{path.stem}.before-{number}{path.suffix}")


def result_files(paths: list[Path]) -> Iterator[Path]:
    """The CSV files among files and folders, without those that were moved aside, and of folders without parts."""
    for path in paths:
        files = [path] if path.is_file() else sorted(file for file in path.rglob("*.csv") if not _is_part(file))
        yield from (file for file in files if ".before-" not in file.name and file.with_suffix(".json").is_file())
