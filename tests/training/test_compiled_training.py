"""A compiled expert learns what an eager one learns, and is compiled once for prompts of many lengths."""

from __future__ import annotations

import functools
import json

import pytest
import torch

from apt.model.compilation import PROMPT_BUCKET, pad_multiple
from tests.training.helpers import train


@pytest.mark.slow
def test_a_compiled_run_has_the_losses_of_an_eager_one(tmp_path, located, monkeypatch):
    """Graphs, guards and gradients as in earnest; the code of the graphs is torch's own, not compiled for minutes."""
    common = {"train_stage": 1, "max_iterations": 3, "eval_split": 0.4, "eval_every": 2, "vlm_layer_stride": 3}
    assert train(tmp_path, "eager", **common) == 0
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    assert train(tmp_path, "compiled", use_compile=True, **common) == 0
    assert trained_losses(tmp_path, "compiled") == pytest.approx(trained_losses(tmp_path, "eager"), rel=1e-3)


def trained_losses(folder, name) -> dict[int, float]:
    lines = (folder / "log" / name / "metrics.jsonl").read_text().splitlines()
    return {row["step"]: row["loss/total"] for row in map(json.loads, lines) if "loss/total" in row}


def test_prompts_are_padded_where_something_is_compiled_alone():
    assert (pad_multiple(compiled=False), pad_multiple(compiled=True)) == (1, PROMPT_BUCKET)
