"""JSON files that are whole or absent."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from data_utils.files import atomic_write


def read_json(path: Path) -> dict[str, Any]:
    """Raises ``ValueError`` with the file's name for one that cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def write_json(path: Path, values: dict[str, Any]) -> None:
    text = json.dumps(values, indent=1) + "\n"
    atomic_write(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
