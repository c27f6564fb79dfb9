"""LIBERO's goal files (BDDL): which things a scene holds, what the instruction is and when the goal holds."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from pathlib import Path

from examples.errors import SimulatorError


class UnusableTask(SimulatorError):
    """A task that was shipped broken: no set-up mends it."""


Predicate = tuple[str, ...]
"""What must hold of which things: ``("in", "milk_1", "basket_1_contain_region")``."""

Goal = tuple[Predicate, ...]
"""All of these at once."""


@dataclass(frozen=True)
class Problem:
    """What a goal file says."""

    language: str
    objects: dict[str, str]
    """Name of a movable thing -> its kind."""
    fixtures: dict[str, str]
    regions: dict[str, str]
    """Name of a place -> the thing it belongs to."""
    init: tuple[Predicate, ...]
    goal: Goal

    def names(self, goal: Goal) -> bool:
        """Whether everything that ``goal`` is about is in this scene."""
        known = {*self.objects, *self.fixtures, *self.regions}
        return all(name in known for _, *arguments in goal for name in arguments)


@functools.lru_cache(maxsize=256)
def read_bddl(path: Path) -> Problem:
    """Raises ``SimulatorError`` where the file is missing, ``UnusableTask`` where it is not a goal file."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise SimulatorError(f"{path}: no such goal file ({error.strerror}); install the package again") from error
    try:
        parts = {part[0].lower(): part[1:] for part in _parsed(text)[1:]}
        goal = parts[":goal"][0]
        return Problem(
            # As it is written: words may hold commas and quotes that are none of the language's symbols.
            language=re.search(r"\(:language\s+([^)]*)\)", text)[1].strip(),
            objects=_typed(parts[":objects"]),
            fixtures=_typed(parts.get(":fixtures", [])),
            regions={f"{owner}_{name}": owner for name, owner in _regions(parts.get(":regions", []))},
            init=tuple(_predicate(item) for item in parts[":init"]),
            goal=tuple(_predicate(item) for item in (goal[1:] if goal[0].lower() == "and" else [goal])),
        )
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise UnusableTask(f"{path}: was shipped as a goal file that does not parse ({error})") from error


def _parsed(text: str) -> list:
    """The file's one expression as nested lists of words."""
    stack: list[list] = [[]]
    for word in re.findall(r"[()]|[^\s()]+", re.sub(r";.*", "", text)):
        if word == "(":
            stack.append([])
        elif word == ")" and len(stack) > 1:
            done = stack.pop()
            stack[-1].append(done)
        elif word == ")":
            raise ValueError("a parenthesis closes that none opens")
        else:
            stack[-1].append(word)
    if len(stack) != 1 or len(stack[0]) != 1:
        raise ValueError("a parenthesis is not closed")
    return stack[0][0]


def _typed(words: list[str]) -> dict[str, str]:
    """``a b - kind c - other`` as name -> kind."""
    kinds: dict[str, str] = {}
    waiting: list[str] = []
    rest = iter(words)
    for word in rest:
        if word == "-":
            kind = next(rest)
            kinds.update(dict.fromkeys(waiting, kind))
            waiting = []
        else:
            waiting.append(word)
    return kinds


def _regions(items: list[list]) -> list[tuple[str, str]]:
    return [(name, next(part[1] for part in parts if part[0] == ":target")) for name, *parts in items]


def _predicate(item: list[str]) -> Predicate:
    return (item[0].lower(), *item[1:])
