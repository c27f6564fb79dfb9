"""What a run that starts from a checkpoint takes over from it, where its command line says nothing else."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from apt.configs import TrainConfig
from apt.model.config import meaning
from train_utils.errors import ConfigError

STRUCTURE = ("model", "arch", "vlm", "vlm_layer_stride")
"""Fields that decide which tensors a policy has and what its features are; the others are those of ``meaning``."""


def inherited(saved: Mapping[str, Any], preset: TrainConfig, says: Callable[[str], bool]) -> dict[str, tuple[str, str]]:
    """Fields in which the policy of a checkpoint is another than the preset's and that no flag sets: field -> the
    checkpoint's value and the preset's, as flags are given.

    Args:
        saved: the checkpoint's configuration.
        says: whether the command line sets a field.
    Raises:
        ConfigError: the configuration contradicts itself.
    """
    own = preset.to_dict()
    found = differing_meaning(saved, preset) | _differing(saved, own, STRUCTURE)
    # What an objective's answer means is told of that objective alone.
    free = [field for field in found if not says(field) and not (field == "prediction" and says("objective"))]
    return {field: found[field] for field in free}


def as_flags(values: Mapping[str, tuple[str, str]]) -> list[str]:
    """The checkpoint's values of :func:`inherited` on a command line."""
    return [
        word
        for field, (value, _) in values.items()
        for word in (f"--{field}", *(value.split() if field == "action_scale" else [value]))
    ]


def other_structure(saved: Mapping[str, Any], config: TrainConfig) -> dict[str, tuple[str, str]]:
    """Fields that decide which tensors there are, the VLM's aside, and differ: field -> before and now."""
    return _differing(saved, config.to_dict(), [field for field in STRUCTURE if field != "vlm"])


def differing_meaning(saved: dict, config: TrainConfig) -> dict[str, tuple[str, str]]:
    """In which fields the weights of a run whose configuration was ``saved`` mean something else than those of
    ``config``: field -> values before and now, as its flag is given. Raises :class:`ConfigError`."""
    try:
        before, now = meaning(saved), meaning(config.to_dict())
    except ValueError as error:
        raise ConfigError(f"the configuration of the run to start from is of no use: {error}") from error
    return {field: (before[field], now[field]) for field in now if before[field] != now[field]}


def _differing(saved: Mapping[str, Any], now: Mapping[str, Any], fields: Sequence[str]) -> dict[str, tuple[str, str]]:
    return {
        field: (str(saved[field]), str(now[field])) for field in fields if saved.get(field, now[field]) != now[field]
    }
