"""Whether the batches of loader processes fit into shared memory, told before anything is built."""

from __future__ import annotations

import os
import sys

from apt.configs import TrainConfig
from train_utils.errors import ConfigError
from train_utils.saving import format_bytes

FOLDER = "/dev/shm"
_BYTES_PER_PIXEL = 4  # three colours and a mask


def bytes_needed(config: TrainConfig) -> int:
    """Of shared memory on one machine: images of the batches that are ready or being made. What comes beside them is
    small."""
    per_sample = max(
        rules.num_obs * len(rules.cameras) * rules.image_hw[0] * rules.image_hw[1] for rules in config.data_configs()
    )
    ahead = config.workers * config.prefetch_factor + 1  # and the one in use
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return ranks * ahead * config.bs * per_sample * _BYTES_PER_PIXEL


def check_shared_memory(config: TrainConfig, folder: str = FOLDER) -> None:
    """Raise :class:`ConfigError` where it is too small, as in a container with Docker's 64 MB."""
    if config.workers == 0 or sys.platform != "linux":
        return
    needed = bytes_needed(config)
    try:
        state = os.statvfs(folder)
    except OSError as error:
        raise ConfigError(f"{folder}: {error.strerror}; loader processes need it, --workers 0 does without") from error
    free = state.f_bavail * state.f_frsize
    if needed > free:
        raise ConfigError(
            f"{folder} has {format_bytes(free)} free, {config.workers} loader processes want {format_bytes(needed)} "
            f"for {config.prefetch_factor} batches of {config.bs} each; give the container more (docker run "
            "--shm-size), or smaller --workers, --prefetch_factor or --bs"
        )
