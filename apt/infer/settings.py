"""What shapes a planner's trajectories beside weights, frames and noise, and what of it cannot go together."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from apt.infer.contract import ObservationContract
from apt.infer.policy import Policy
from apt.infer.realtime_chunking import RealTimeChunking
from data_utils.config import DataConfig
from data_utils.datasets import get_dataset_class
from train_utils.errors import ConfigError


@dataclass(frozen=True)
class PlannerSettings:
    """Of one session; checked when constructed.

    Args:
        config: cameras, arms and times.
        ensemble: trajectories that are blended into the returned one; 0: none.
        seed: of the diffusion noise.
        steps: denoising steps; None: the usual number.
        sampler: of the policy's objective.
        chunking: real-time chunking; None: not.
    Raises:
        ValueError: an ensemble of no size, ensembling and real-time chunking at once, or a delay that is not shorter
            than a chunk (where the time step is measured from the frames, the first query says so).
    """

    config: DataConfig
    ensemble: int
    seed: int
    steps: int | None
    sampler: str
    chunking: RealTimeChunking | None

    def __post_init__(self) -> None:
        n, chunking = self.ensemble, self.chunking
        if isinstance(n, bool) or not isinstance(n, (int, np.integer)) or n < 0:
            raise ValueError(f"ensemble size is {n!r}; wanted 0 (off) or more")
        object.__setattr__(self, "ensemble", int(n))
        if chunking is None:
            return
        if not isinstance(chunking, RealTimeChunking):
            raise ValueError(f"chunking is a {type(chunking).__name__}; wanted RealTimeChunking or None")
        if n > 0:
            raise ValueError(
                f"real-time chunking and an ensemble of {n} exclude each other: blending would undo the frozen steps; "
                "set the ensemble to 0, or chunking to None"
            )
        contract = ObservationContract(self.config)
        if contract.chunk_length is not None:
            chunking.check_fits(contract.chunk_length, contract.time_unit)


def planner_settings(
    policy: Policy,
    ensemble: int,
    seed: int,
    steps: int | None,
    sampler: str | None,
    chunking: RealTimeChunking | None,
    config: str | dict | DataConfig | None,
) -> PlannerSettings:
    """Settings of a session on ``policy``; what is None is the policy's own. Raises ``ValueError``."""
    policy.schedule(steps, sampler)  # checks them
    config = policy.train_config.data_configs()[0] if config is None else config
    sampler = policy.samplers[0] if sampler is None else sampler
    return PlannerSettings(data_config(policy, config), ensemble, seed, steps, sampler, chunking)


def data_config(policy: Policy, config: str | dict | DataConfig) -> DataConfig:
    """What ``TrajPlanner.set_config`` takes, checked against the policy. Raises ``ValueError``."""
    if isinstance(config, str):
        config = _trained_config(policy, config)
    elif isinstance(config, dict):
        config = DataConfig.from_dict(config)
    trained = policy.model.config
    if (config.num_history, config.num_future) != (trained.num_history, trained.num_future):
        raise ConfigError(
            f"the config has {config.num_history} history and {config.num_future} future states, the policy was "
            f"trained with {trained.num_history} and {trained.num_future}"
        )
    return config


def _trained_config(policy: Policy, name: str) -> DataConfig:
    """As training had it, image size included. Raises ``ValueError``."""
    trained = dict(zip(policy.train_config.dataset_classes, policy.train_config.data_configs(), strict=True))
    if name not in trained:
        get_dataset_class(name)  # an unknown name is another mistake than an untrained one
        raise ConfigError(
            f"the policy was not trained on {name}; it was on {', '.join(trained)}: name one of these, or give the "
            "cameras, arms and times of a robot that is like them as a DataConfig (a dictionary will do)"
        )
    return trained[name]
