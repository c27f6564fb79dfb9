"""Where two settings differ, in words: for runs that go on only with the settings they were begun with."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator

SHOWN = 5


def describe_differences(begun: object, now: object) -> str:
    """``path: old -> new`` for every innermost value that differs between two JSON values, the first few of them.

    An empty text where nothing differs.
    """
    differing = list(_differences(begun, now, ""))
    more = f"; and {len(differing) - SHOWN} more" if len(differing) > SHOWN else ""
    return "; ".join(differing[:SHOWN]) + more


def _differences(old: object, new: object, where: str) -> Iterator[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        for name in sorted({*old, *new}):
            yield from _differences(old.get(name), new.get(name), f"{where}.{name}".lstrip("."))
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for index, (one, other) in enumerate(zip(old, new, strict=True)):
            yield from _differences(one, other, f"{where}[{index}]")
    elif old != new:
        texts = [value if isinstance(value, str) else json.dumps(value) for value in (old, new)]
        begin = max(0, len(os.path.commonprefix(texts)) - 20)  # long values are cut around their first difference
        yield f"{where}: {' -> '.join(_shown(text, begin) for text in texts)}"


def _shown(text: str, begin: int) -> str:
    if len(text) <= 100:
        return text
    return f"{'...' if begin else ''}{text[begin : begin + 100]}{'...' if len(text) > begin + 100 else ''}"
