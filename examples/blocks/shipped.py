"""Where the policy is that comes with the library, and how it is run."""

from __future__ import annotations

from pathlib import Path

MODELS = Path(__file__).resolve().parents[2] / "assets" / "models"
POLICY = MODELS / "blocks_policy"
"""The VLA, an exported folder with averaged weights."""
PRIOR = MODELS / "blocks_prior"
"""Its VA prior, in the same way."""
EXECUTE_STEPS = 8
DENOISING_STEPS = 10
