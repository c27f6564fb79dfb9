"""Training runs that do the same however many processes share the work; run by ``test_deepspeed.py``, under torchrun.

Each process takes its rows of batches and of random draws that are the same for all, so that two processes of two
samples do what one process of four does.

    python -m torch.distributed.run ... -m tests.training.joined_batches RUNS.json

The file lists the command lines of ``apt.train`` to run one after the other, all under one back-end.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from apt.model.experts.base import RobotState, TrainingDraws
from apt.model.vla import robot_state
from apt.train import select_backend
from apt.training.cli import parse_train_config
from apt.training.trainer import Trainer
from data_utils.types import Batch
from tests.model.helpers import make_batch
from train_utils.backend import Backend

PROMPTS = ["pick up the milk", "pick up the can", "put it down!!", "go for the bread"]
POISONED = 1  # iteration that a run named "poisoned" finds a NaN in, in the last row


class JoinedTrainer(Trainer):
    def __init__(self, config, backend: Backend) -> None:
        super().__init__(config, backend)
        self._draw_whole = self.model.expert.draw
        self.model.expert.draw = self._draw_rows
        each = len(PROMPTS) // backend.world_size
        self._rows = slice(backend.rank * each, (backend.rank + 1) * each)
        self._batches = self._joined()

    def _whole(self, rows: slice) -> Batch:
        seed = len(PROMPTS) * self._index + rows.start
        future = self.model.config.num_future
        return make_batch(self.model.vlm, PROMPTS[rows], cameras=1, num_future=future, seed=seed)

    def _joined(self) -> Iterator[Batch]:
        self._index = self.iteration * self.config.gradient_accumulation_steps
        while True:
            batch = self._whole(self._rows)
            if (
                self.config.name.startswith("poisoned")
                and self.iteration == POISONED
                and self._rows.stop == len(PROMPTS)
            ):
                batch.future[-1] = torch.nan
            yield batch
            self._index += 1

    def _draw_rows(self, _robot: RobotState, *options) -> TrainingDraws:
        generator = torch.Generator().manual_seed(self._index)
        robot = robot_state(self._whole(slice(0, len(PROMPTS))).observation)
        draws = self._draw_whole(robot, *options[:-1], generator)
        fields = {field.name: getattr(draws, field.name) for field in dataclasses.fields(draws)}
        return TrainingDraws(**{n: value if value is None else value[self._rows] for n, value in fields.items()})


def run_all(lines: list[list[str]]) -> None:
    backend = select_backend(parse_train_config(lines[0]))
    for line in lines:
        JoinedTrainer(parse_train_config(line), backend).run()
        backend.barrier()
    backend.close()


if __name__ == "__main__":
    torch.set_num_threads(1)
    run_all(json.loads(Path(sys.argv[1]).read_text()))
