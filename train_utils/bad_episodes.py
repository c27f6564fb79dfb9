"""The episodes that a run cannot use: counted over all ranks, listed in a file, a reason to stop when they are many."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from data_utils.errors import DataError, UnusableEpisode
from data_utils.files import write_text
from data_utils.samples.dataset import H5DatasetMapBase
from train_utils.backend import Backend

SKIPPED = "skipped_episodes.jsonl"


@dataclass
class BadEpisode:
    """A line of the list."""

    path: str
    rule: str  # of data_utils.errors.RULES
    message: str
    times: int = 0  # draws that met it; 0: left out when its dataset was opened
    blocked: bool = False  # it ended or hung the process that read it, and is not opened again


class BadEpisodes:
    """What is wrong with the episodes of a run.

    Args:
        datasets: of the run; what their indexes found is bad from the start.
        limit: share of all episodes that may be bad.
        file: the list, one JSON object per line.
        resume: go on with the list as it is; episodes that were changed since then are given another chance.
    """

    def __init__(self, datasets: Sequence[H5DatasetMapBase], limit: float, file: Path, resume: bool) -> None:
        self.total = sum(dataset.paths.num_listed for dataset in datasets)
        self.limit, self.file = limit, file
        self._known: dict[str, BadEpisode] = {}
        if resume and file.is_file():
            written = file.stat().st_mtime
            for line in file.read_text(encoding="utf-8").splitlines():
                episode = BadEpisode(**json.loads(line))
                # What indexes find is found again.
                if episode.times and os.path.exists(episode.path) and os.stat(episode.path).st_mtime <= written:
                    self._known[episode.path] = episode
        for dataset in datasets:
            for fault in dataset.faults:
                self._known[fault.path] = BadEpisode(fault.path, fault.rule, fault.message)
        self._new: list[UnusableEpisode] = []
        self._is_written = not self._known

    def __len__(self) -> int:
        return len(self._known)

    @property
    def blocked(self) -> set[str]:
        """Files that must not be opened again."""
        return {episode.path for episode in self._known.values() if episode.blocked}

    def add(self, skipped: Iterable[UnusableEpisode]) -> None:
        """Remember what this rank skipped."""
        self._new += skipped

    def exchange(self, backend: Backend) -> None:
        """Bring all ranks to the same knowledge, and the list up to date; called by all of them.

        Raises:
            DataError: on every rank, where more than the allowed share of the episodes is bad.
        """
        for skipped in map(UnusableEpisode._make, backend.gather(self._new)):
            episode = self._known.setdefault(skipped.path, BadEpisode(skipped.path, skipped.rule, skipped.message))
            episode.times += 1
            if skipped.blocked and not episode.blocked:
                episode.rule, episode.message, episode.blocked = skipped.rule, skipped.message, True
            self._is_written = False
        self._new = []
        if not self._is_written:
            if backend.is_main:
                self._write()
            self._is_written = True
        if len(self._known) > self.limit * self.total:
            bad, first = len(self._known), next(iter(self._known.values()))
            raise DataError(
                f"{bad} of {self.total} episodes ({bad / self.total:.1%}) cannot be used, more than max_bad_fraction "
                f"{self.limit:g}; the first: {first.message}; all are listed in {self.file}; look at them with python "
                "-m data_utils.inspect, or raise --max_bad_fraction",
                first.rule,
            )

    def _write(self) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps(dataclasses.asdict(episode)) + "\n" for episode in self._known.values()]
        write_text(self.file, "".join(lines))
