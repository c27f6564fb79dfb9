"""Training of a small vision-language model: from scenes to a folder that ``--vlm`` takes."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator

import numpy as np
import torch
from torch import nn

from apt.grounding.architecture import build, load, make_tokenizer, save
from apt.grounding.batches import BatchMaker, GroundingBatch
from apt.grounding.card import write_card
from apt.grounding.config import GroundingConfig
from apt.grounding.dialogues import DialogueSampler
from apt.grounding.losses import GroundingModel, Judgement
from apt.grounding.places import place_words
from apt.grounding.scenes import SceneSet, parts_of
from data_utils.cli import bar
from data_utils.files import atomic_write
from data_utils.words import format_duration
from train_utils.errors import ConfigError

STATE_FILE = "training.pt"
PROGRESS_FILE = "progress.jsonl"
IMAGE_STATISTICS = ([0.5] * 3, [0.5] * 3)
EXTRA_TEXTS = ("where is the what is at there none user assistant",)


class GroundingRun:
    """Builds everything, or takes up a run that was stopped; then trains."""

    def __init__(self, config: GroundingConfig) -> None:
        self.config = config
        if config.threads:
            torch.set_num_threads(config.threads)
        parts = parts_of(config.scenes)
        if len(parts) < 2:
            raise ConfigError(f"{config.scenes} has {len(parts)} parts; wanted two at least, the first for judging")
        self.train, self.held_out = SceneSet(parts[1:]), SceneSet(parts[:1])
        names = sorted({*self.train.names(), *self.held_out.names()})
        description = self.train.description
        if config.init is None:
            self.tokenizer = make_tokenizer((*names, *description.sentences, *EXTRA_TEXTS), config.sizes.bins)
            model = build(config.sizes, self.tokenizer, description.image_size, config.seed)
        else:
            self.tokenizer, model = load(config.init, config.sizes, description.image_size)
        grid = description.image_size // 16
        self.model = GroundingModel(
            model, IMAGE_STATISTICS, len(names), len(description.cameras), config.sizes.bins, config.looking_layer
        )
        image_id, pad_id = model.config.image_token_id, self.tokenizer.pad_token_id
        self._makers = {}
        for scenes in (self.train, self.held_out):
            sampler = DialogueSampler(scenes, self.tokenizer, grid**2, config.sizes.bins)
            self._makers[scenes] = BatchMaker(scenes, sampler, names, grid, pad_id, image_id)
        betas = (0.9, 0.98)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), config.lr, betas=betas, weight_decay=config.wd, fused=True
        )
        self.step, self.judged = 0, {}
        self.seconds = 0.0
        self._resume()

    def run(self) -> dict[str, float]:
        """Train to the last step and write the model; returns what the last judgement said."""
        config = self.config
        config.out.mkdir(parents=True, exist_ok=True)
        self.model.train()
        began = time.monotonic() - self.seconds
        steps = config.vision_steps + config.steps
        with bar(total=steps, initial=self.step, unit="step") as progress:
            while self.step < steps:
                for group in self.optimizer.param_groups:
                    group["lr"] = config.lr * self._rate()
                batch = self._batch(self.train, self.step, config.batch)
                sees_only = self.step < config.vision_steps
                loss = self.model.seeing_loss(batch) if sees_only else self.model(batch).loss
                self.optimizer.zero_grad(set_to_none=True)
                loss.backward()
                nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
                self.optimizer.step()
                self.step += 1
                progress.update()
                if self.step % config.judge_every == 0 or self.step == steps:
                    self.seconds = time.monotonic() - began
                    self.judged = self.judge()
                    self._save()
                    said = "  ".join(f"{name} {value:.3f}" for name, value in self.judged.items())
                    progress.write(f"{self.step}/{steps}  {format_duration(self.seconds)}  {said}")
        save(self.model.model, self.tokenizer, config.out)
        write_card(config.out, config.settings(), self.train.description, len(self.train), self.judged, self.seconds)
        return self.judged

    def _rate(self) -> float:
        """Rises and falls once in the vision tower's own steps, and once in the others."""
        step, steps = self.step, self.config.vision_steps
        if step >= steps:
            step, steps = step - steps, self.config.steps
        share = step / steps
        return min(1.0, share / self.config.warmup) * (0.5 * (1 + math.cos(math.pi * share)) + 0.005)

    def _batch(self, scenes: SceneSet, number: int, size: int) -> GroundingBatch:
        """A function of the seed and the step, so that a resumed run goes on with the same batches."""
        rng = np.random.default_rng([self.config.seed, number])
        drawn = rng.integers(len(scenes), size=size)
        return self._makers[scenes].draw(rng, drawn, self.config.all_cameras)

    @torch.inference_mode()
    def judge(self) -> dict[str, float]:
        """On held-out scenes, always the same questions.

        Returns:
            ``point_u``, ``point_v``: share of mentions whose last layer points to within one bin, per axis;
            ``point_CAMERA``: in both axes, in this camera's pictures; ``look_CAMERA``: share of its head's attention
            on the cell where what is named lies; ``see_CAMERA``: share of things that the vision tower names in their
            cell;
            ``point_error``: median distance as a share of the image; ``word_u``, ``word_v``: as ``point_``, of places
            that answers say; ``text``: share of the other tokens of answers that are right; ``loss``.
        """
        self.model.eval()
        rng = np.random.default_rng(5)
        found: dict[str, list[torch.Tensor]] = {}
        every = np.arange(len(self.held_out))
        for scenes in np.array_split(every, max(1, len(every) // self.config.batch)):
            batch = self._makers[self.held_out].draw(rng, scenes, self.config.all_cameras)
            cameras = self.held_out.description.cameras
            for name, values in measure(self.model(batch), batch, self.tokenizer, self.config.sizes.bins, cameras):
                found.setdefault(name, []).append(values.float().flatten())
        self.model.train()
        return {
            name: float(torch.cat(values).median() if name == "point_error" else torch.cat(values).mean())
            for name, values in found.items()
        }

    def _save(self) -> None:
        state = {
            "settings": json.dumps(self.config.settings()),
            "step": self.step,
            "seconds": self.seconds,
            "judged": self.judged,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        atomic_write(self.config.out / STATE_FILE, lambda temporary: torch.save(state, temporary))
        with open(self.config.out / PROGRESS_FILE, "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": self.step, "seconds": round(self.seconds, 1), **self.judged}) + "\n")

    def _resume(self) -> None:
        file = self.config.out / STATE_FILE
        if not file.is_file():
            return
        state = torch.load(file, weights_only=True)
        if state["settings"] != json.dumps(self.config.settings()):
            raise ConfigError(f"{file} is of a run with other settings; give the same ones, or another --out")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds, self.judged = state["step"], state["seconds"], state["judged"]


def measure(
    said: Judgement, batch: GroundingBatch, tokenizer, bins: int, cameras: tuple[str, ...]
) -> Iterator[tuple[str, torch.Tensor]]:
    """What :meth:`GroundingRun.judge` averages: a number per mention, per token of an answer, or per batch."""
    yield "loss", said.loss
    off = said.pointed - batch.mention_place
    for axis, name in enumerate("uv"):
        yield f"point_{name}", off[:, axis].abs() <= 1 / bins
    for camera, name in enumerate(cameras):
        yield f"point_{name}", (off[batch.mention[:, 2] == camera].abs() <= 1 / bins).all(1)
        yield f"look_{name}", said.looked[batch.mention[:, 2] == camera]
        there = (batch.cell_name != batch.nothing) & (batch.image_camera == camera).unsqueeze(1)
        yield f"see_{name}", said.cells[there] == batch.cell_name[there]
    yield "point_error", off.norm(dim=1)
    places = torch.tensor(tokenizer.convert_tokens_to_ids(place_words(bins))).view(2, -1)
    for words, name in zip(places, "uv", strict=True):
        of_axis = torch.isin(said.wanted, words)
        best = said.words[of_axis][:, words].argmax(-1)
        yield f"word_{name}", (best - (said.wanted[of_axis] - words[0])).abs() <= 1
    is_place = torch.isin(said.wanted, places)
    yield "text", said.words[~is_place].argmax(-1) == said.wanted[~is_place]
