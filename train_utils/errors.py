"""Errors that a run reports in one line."""

from __future__ import annotations


class ConfigError(ValueError):
    """A configuration that contradicts itself; the message names the field."""


class RunFailed(RuntimeError):
    """A run that cannot go on, through no fault of the code; the message is the whole report."""


class DiskFullError(OSError):
    """No room for a file; the message says how much it takes."""

    def __str__(self) -> str:
        return self.strerror
