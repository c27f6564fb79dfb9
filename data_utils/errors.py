"""The one exception type for data that cannot be used."""

from __future__ import annotations


class DataError(ValueError):
    """A file, key or location that cannot be used; the message is one line that names it and says what to do."""
