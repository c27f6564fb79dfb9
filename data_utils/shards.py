"""A part of some work, for one of several machines that share a folder or are merged later.

Which part an episode belongs to follows from its number alone, so that a part that was killed is run again as it was.
The same command without ``--shard`` takes up what all parts have left, does what is missing, and writes what the whole
would have written.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from data_utils.cli import CommandLineError


@dataclass(frozen=True)
class Shard:
    """Part ``index`` (from 0) of ``count``. Raises :class:`CommandLineError` where there is no such part."""

    index: int
    count: int

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            last = max(0, self.count - 1)
            raise CommandLineError(
                f"--shard is {self.index}/{self.count}; the parts are 0/{self.count} to {last}/{self.count}"
            )

    @classmethod
    def parse(cls, text: str | None) -> Shard | None:
        """Of ``I/N``; None of None. Raises :class:`CommandLineError`."""
        if text is None:
            return None
        if not (found := re.fullmatch(r"(\d+)/(\d+)", text)):
            raise CommandLineError(f"--shard is {text!r}; wanted I/N, for instance 0/4 to 3/4 for four parts")
        return cls(int(found[1]), int(found[2]))

    def owns(self, number: int) -> bool:
        return number % self.count == self.index

    @property
    def suffix(self) -> str:
        """For the names of this part's files."""
        return f".{self.index}_of_{self.count}"
