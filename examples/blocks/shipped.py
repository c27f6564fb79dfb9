"""Where the policy is that comes with the library, and how it is run."""

from __future__ import annotations

from pathlib import Path

from examples.pickplace.policies import ModelPolicy

MODELS = Path(__file__).resolve().parents[2] / "assets" / "models"
POLICY = MODELS / "blocks_policy"
"""The VLA, an exported folder with averaged weights."""
PRIOR = MODELS / "blocks_prior"
"""Its VA prior, in the same way."""
EXECUTE_STEPS = 4
SETTLE_STEPS = 6
"""Fingers take some steps to open."""
DENOISING_STEPS = 10
ENSEMBLE = 2
"""Each trajectory is the mean of two queries'."""


def load_planner(ckpt: Path = POLICY, device: str = "cpu", **options):
    """A :class:`~apt.infer.planner.TrajPlanner` that plans as all examples of blocks do; ``options``: others of its."""
    from apt.infer.planner import TrajPlanner  # and the model's libraries: not for --help

    return TrajPlanner(ckpt, device=device, ensemble=ENSEMBLE, steps=DENOISING_STEPS, **options)


def model_policy(planner, seed: int | None = None) -> ModelPolicy:
    """One that executes as all examples of blocks do."""
    return ModelPolicy(planner, EXECUTE_STEPS, seed=seed, settle_steps=SETTLE_STEPS)
