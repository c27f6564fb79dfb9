"""The simulated worlds whose demonstrations an ablation records itself, by the data set that they become."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class World:
    """How its demonstrations are recorded and its policies judged.

    Args:
        record: the program, a module; flags: of its own.
        evaluation: name of the one that runs policies in it.
    """

    record: str
    flags: tuple[str, ...]
    evaluation: str


WORLDS = {
    "PickPlaceCan": World("examples.pickplace.record", ("--scene", "trays", "--paraphrases", "1"), "pickplace"),
    "Blocks": World("examples.blocks.record", (), "blocks"),
}
