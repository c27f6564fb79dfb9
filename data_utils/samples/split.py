"""Episodes that are kept apart from training, chosen by their names alone."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence

from data_utils.errors import DataError
from data_utils.samples.dataset import H5DatasetMapBase


def is_held_out(name: str, share: float) -> bool:
    """Whether the episode called ``name`` (its path below its location) is among the ``share`` that is kept apart.

    It depends on nothing else; what a smaller share keeps apart, a larger one does too.
    """
    digest = hashlib.blake2b(os.fsencode(name), digest_size=8).digest()
    return int.from_bytes(digest, "big") < share * 2**64


def split(datasets: Sequence[H5DatasetMapBase], share: float) -> tuple[list[H5DatasetMapBase], list[H5DatasetMapBase]]:
    """Datasets to train on, and those of the held-out episodes: none where ``share`` (``eval_split``) is 0.

    Raises:
        DataError: nothing is held out, or nothing of a dataset is left.
    """
    if share == 0:
        return list(datasets), []
    parts = [dataset.split(lambda name: is_held_out(name, share)) for dataset in datasets]
    for rest, apart in parts:
        if not len(rest):
            what = f"holds out all {len(apart)} episodes of {rest.name}; lower it"
            raise DataError(f"eval_split {share:g} {what}", "location")
    held_out = [apart for _, apart in parts if len(apart)]
    if not held_out:
        count = sum(len(rest) for rest, _ in parts)
        what = f"holds out none of {count} episodes (it takes those whose names' hashes are below it)"
        raise DataError(f"eval_split {share:g} {what}; raise it, or give 0", "location")
    return [rest for rest, _ in parts], held_out
