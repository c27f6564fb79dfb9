"""Run under torchrun by ``test_ddp.py``: gradients of this rank's share of a joined batch, saved by rank 0."""

from __future__ import annotations

import dataclasses
import sys

import torch

from apt.model.config import VLAConfig
from apt.model.experts.base import TrainingDraws
from apt.model.objectives.diffusion import Diffusion
from apt.model.vla import VLA, robot_state
from data_utils.types import Batch
from tests.model.helpers import make_batch
from train_utils.backend import DDPBackend
from train_utils.optim import build_optimizer

PROMPTS = ["pick up the milk", "pick up the can", "put it down!!", "go for the bread"]


def gradients(backend: DDPBackend, out: str) -> None:
    torch.manual_seed(0)
    config = VLAConfig(model="tiny", vlm="tiny", vlm_layer_stride=1, vlm_mode="full", num_future=8)
    model = VLA(config).train()
    whole = make_batch(model.vlm, PROMPTS)
    draws = TrainingDraws.draw(
        robot_state(whole.observation), 8, Diffusion(), True, generator=torch.Generator().manual_seed(1)
    )
    each = len(PROMPTS) // backend.world_size
    rows = slice(backend.rank * each, (backend.rank + 1) * each)
    model.expert.draw = lambda *_args, **_kw: _rows(draws, rows)
    forward = backend.prepare(model, build_optimizer(model, 1e-3, 0.0))
    backend.backward(forward(_batch_rows(model.vlm, rows)).total)
    if backend.is_main:
        torch.save({name: p.grad for name, p in model.named_parameters() if p.grad is not None}, out)


def _rows(draws: TrainingDraws, rows: slice) -> TrainingDraws:
    fields = {f.name: getattr(draws, f.name) for f in dataclasses.fields(draws)}
    return TrainingDraws(**{name: value[rows] for name, value in fields.items()})


def _batch_rows(vlm, rows: slice) -> Batch:
    return make_batch(vlm, PROMPTS[rows], seed=rows.start)


if __name__ == "__main__":
    backend = DDPBackend("cpu")
    gradients(backend, sys.argv[1])
    backend.barrier()
    backend.close()
