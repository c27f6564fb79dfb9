"""The numbers of an action, and what they are divided by for the network."""

from __future__ import annotations

import math
from collections.abc import Sequence

ACTION_DIM = 10
TRANSLATION = slice(0, 3)
ROTATION = slice(3, 9)
GRIPPER = slice(9, 10)
_PARTS = (3, 6, 1)  # of translation, rotation and gripper


def full_scale(scale: Sequence[float] | None) -> tuple[float, ...]:
    """``action_scale`` of a configuration as 10 numbers, by which actions are divided for the network.

    Args:
        scale: of translation (m), rotation and gripper, or of each of the 10 numbers; None: 1, as released.
    Raises:
        ValueError: another number of them, or one that is not positive.
    """
    if scale is None:
        return (1.0,) * ACTION_DIM
    numbers = isinstance(scale, Sequence) and all(
        isinstance(number, (int, float)) and not isinstance(number, bool) and 0 < number < math.inf for number in scale
    )
    if not numbers or len(scale) not in (len(_PARTS), ACTION_DIM):
        given = " ".join(map(str, scale)) if isinstance(scale, Sequence) and not isinstance(scale, str) else scale
        raise ValueError(
            f"action_scale is {given}; wanted 3 positive numbers (translation in metres, rotation, gripper), 10 (of "
            "each number of an action), or None"
        )
    if len(scale) == ACTION_DIM:
        return tuple(map(float, scale))
    return tuple(float(number) for number, count in zip(scale, _PARTS, strict=True) for _ in range(count))


def scale_words(scale: Sequence[float] | None) -> str:
    """As the flag ``--action_scale`` takes it, in as few numbers as say it. Raises ``ValueError``."""
    full = full_scale(scale)
    parts = [full[part] for part in (TRANSLATION, ROTATION, GRIPPER)]
    short = full if any(len(set(part)) > 1 for part in parts) else tuple(part[0] for part in parts)
    return "None" if set(full) == {1.0} else " ".join(f"{number:g}" for number in short)
