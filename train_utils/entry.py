"""Where the command ``apt-vla`` begins: outside ``apt``, whose name another package may have taken."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path

OURS = Path(__file__).resolve().parents[1] / "apt"


def main() -> int:
    """Runs ``apt.cli``; 2 where ``apt`` is not this library's, for instance Debian's python3-apt."""
    found = importlib.util.find_spec("apt")
    place = None if found is None or found.origin is None else Path(found.origin).resolve().parent
    if place != OURS:
        print(
            f"error: Python finds another package apt ({place}; Debian's python3-apt has that name) before this "
            f"library's ({OURS}); use a virtual environment of its own, and no PYTHONPATH that leads there",
            file=sys.stderr,
        )
        return 2
    return importlib.import_module("apt.cli").main()
