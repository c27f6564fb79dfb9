"""How much of everything an ablation takes: recorded episodes, training steps, evaluation."""

from __future__ import annotations

from dataclasses import dataclass, field

from apt.ablation.evaluation import EvaluationSizes
from apt.ablation.grid import Iterations


@dataclass(frozen=True)
class Sizes:
    """Beside the training configuration.

    Args:
        episodes: demonstrations to record for training; test_episodes: held out.
        pace: seconds per unit of each kind of work on one core, for estimates before anything has run.
    """

    episodes: int
    test_episodes: int
    iterations: Iterations
    evaluation: EvaluationSizes
    pace: dict[str, float] = field(default_factory=dict)


SIZES = {
    # Each grid with two seeds within 18 minutes on two CPU cores.
    "ablate_cpu": Sizes(
        episodes=60,
        test_episodes=6,
        iterations=Iterations(va=100, vla=160, one_stage=160),
        evaluation=EvaluationSizes(
            episodes=5,
            max_steps=90,
            execute_steps=6,
            ensemble=2,
            denoising_steps=4,
            noise_seeds=4,
            every=16,
            image_size=96,
        ),
    ),
    "ablate": Sizes(
        episodes=600,
        test_episodes=48,
        iterations=Iterations(va=20000, vla=20000, one_stage=20000),
        evaluation=EvaluationSizes(episodes=50, ensemble=4, execute_steps=4, denoising_steps=10),
    ),
}


def sizes_for(preset: str) -> Sizes:
    """A configuration that has no sizes of its own takes those of ``ablate``."""
    return SIZES.get(preset, SIZES["ablate"])
