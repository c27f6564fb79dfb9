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
        pace: seconds per unit of each kind of work (episode, training step, cell) on one core, recording on two, for
            estimates before anything has run; a kind that is not there is unknown.
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
        iterations=Iterations(va=120, vla=300, one_stage=300),
        evaluation=EvaluationSizes(
            episodes=4,
            max_steps=90,
            execute_steps=6,
            ensemble=2,
            denoising_steps=4,
            noise_seeds=4,
            every=16,
            image_size=96,
        ),
        pace={"record": 1.3, "stage 0": 0.3, "stage 1": 0.4, "evaluation": 40.0},
    ),
    # About half an hour of training per cell on two CPU cores.
    "blocks": Sizes(
        episodes=250,
        test_episodes=24,
        iterations=Iterations(va=400, vla=1600, one_stage=1600),
        evaluation=EvaluationSizes(
            episodes=40,
            max_steps=110,
            execute_steps=4,
            ensemble=2,
            denoising_steps=10,
            noise_seeds=8,
            every=8,
            image_size=128,
        ),
        pace={"record": 2.8, "stage 0": 0.35, "stage 1": 0.55, "evaluation": 300.0},
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
