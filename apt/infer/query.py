"""From a window of frames to the policy's input."""

from __future__ import annotations

import dataclasses

import numpy as np

from apt.infer.contract import ObservationContract
from apt.infer.frame_window import FrameWindow
from apt.infer.policy import Policy
from apt.infer.realtime_chunking import Chunk, RealTimeChunking, guide_from_chunk
from apt.model.objectives.base import Guide
from data_utils.batches.collate import Collator
from data_utils.config import DataConfig
from data_utils.samples.observation import future_times
from data_utils.types import Observation


def collator(policy: Policy, config: DataConfig, pad_multiple: int) -> Collator:
    """Samples of ``config`` to the policy's input; prompts are padded to a multiple of ``pad_multiple`` tokens."""
    tokenize = policy.prompt_tokenizer(config.image_hw)
    return Collator(tokenize, tokenize.pad_id, config.num_cameras, config.num_arms, pad_multiple)


@dataclasses.dataclass(frozen=True)
class Query:
    """What a query depends on, as it was read of a planner when the query's turn came."""

    window: FrameWindow
    prompt: str
    collate: Collator
    chunking: RealTimeChunking | None
    executed: Chunk | None
    resets: int

    def prepare(self) -> tuple[Observation, np.ndarray, Guide | None]:
        """The model's input, the times (Ta,) of what it will predict, and what that is drawn towards.

        Raises:
            ValueError: one frame cannot tell the time step, or the delay is not shorter than the chunk.
        """
        config, now, step = self.window.config, self.window.newest.timestamp, self.window.time_step
        if step is None:
            raise ValueError(
                "one frame cannot tell the time step and the config sets neither sample_dt nor record_dt; "
                "add a second frame, or set_config one with sample_dt"
            )
        times = future_times(config, now, step)
        observation = self.collate([self.window.sample(self.prompt, step)]).observation
        guide = None
        if self.chunking is not None:
            self.chunking.check_fits(times[-1] - now, ObservationContract(config).time_unit)
            if self.executed is not None:
                guide = guide_from_chunk(self.chunking, self.executed, times, now, observation)
        return observation, times, guide
