"""What an inspection found in one file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from data_utils.checks.checker import Report
from data_utils.checks.contents import Contents
from data_utils.errors import Fault


@dataclass(frozen=True)
class Inspected:
    path: str
    faults: tuple[Fault, ...]
    warnings: tuple[Fault, ...]
    contents: Contents | None
    """None where the file cannot be read so far."""

    @classmethod
    def of(cls, path: str, report: Report) -> Inspected:
        contents = Contents.from_dict(report.contents) if report.contents else None
        return cls(path, report.faults, report.warnings, contents)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Inspected:
        """Inverse of ``dataclasses.asdict``, also after a way through JSON."""
        faults, warnings = (tuple(Fault(*fault) for fault in values[name]) for name in ("faults", "warnings"))
        contents = None if values["contents"] is None else Contents.from_dict(values["contents"])
        return cls(values["path"], faults, warnings, contents)
