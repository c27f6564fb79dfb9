"""Queries on blank images, so that the first real one finds everything compiled, recorded and cached."""

from __future__ import annotations

import numpy as np

from apt.infer.frame_window import blank_sample
from apt.infer.policy import Policy
from apt.infer.query import collator
from apt.infer.realtime_chunking import Chunk, RealTimeChunking, guide_from_chunk
from data_utils.config import DataConfig
from data_utils.samples.observation import future_times


def warm_up(
    policy: Policy,
    config: DataConfig,
    sample_num: int,
    prompt_tokens: int,
    steps: int | None,
    sampler: str | None,
    chunked: bool,
) -> None:
    """Run the policy once in every shape that queries will have; arguments as of ``TrajPlanner.warm_up``.

    Args:
        chunked: some of these queries go on from a chunk (real-time chunking).
    """
    sample = blank_sample(config)
    shortest = collator(policy, config, 1)([sample]).observation
    bucket = policy.pad_multiple
    first = -(-shortest.input_ids.shape[1] // bucket)
    last = first if bucket == 1 else -(-(shortest.input_ids.shape[1] + prompt_tokens) // bucket)
    generator = policy.generator(0)
    # Eager, a batch of any size finds all that one did.
    sizes = [1] if policy.compile == "none" else [1 << n for n in range((policy.queue.max_batch - 1).bit_length() + 1)]
    for number in range(first, last + 1):
        observation = collator(policy, config, number * bucket)([sample]).observation
        guides = [None]
        if chunked:
            times = future_times(config, 0.0, 1.0)
            rest = Chunk(times, np.repeat(sample.history[-1:], len(times), axis=0))
            guides.append(guide_from_chunk(RealTimeChunking(0.0), rest, times, 0.0, observation))
        for guide in guides:
            request = policy.request(observation, generator, sample_num, steps, sampler, guide)
            with policy.queue.turns:
                for count in sizes:
                    policy.infer([request] * count)
