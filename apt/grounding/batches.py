"""Dialogues and pictures as tensors, and the places that they should be told apart by."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from apt.grounding.dialogues import Dialogue, DialogueSampler
from apt.grounding.scenes import SceneSet, Thing


@dataclass
class GroundingBatch:
    """B sequences of length L, padded on the left, about I pictures of G x G tokens."""

    images: torch.Tensor  # (I, 3, H, W) uint8
    image_camera: torch.Tensor  # (I,) int64
    input_ids: torch.Tensor  # (B, L)
    position_ids: torch.Tensor  # (3, B, L)
    attention_mask: torch.Tensor  # (B, L) bool
    is_answer: torch.Tensor  # (B, L) bool
    cell_name: torch.Tensor  # (I, G * G) int64, what lies in a picture's cell
    nothing: int  # among these, where nothing lies; the number of names
    cell_offset: torch.Tensor  # (I, G * G, 2) where in the cell, shares of it
    mention: torch.Tensor  # (M, 3) int64: sequence, token, camera in whose picture it lies
    mention_seen: torch.Tensor  # (M,) int64, the token of the cell where it lies there
    mention_place: torch.Tensor  # (M, 2) u and v there
    mentioned: list[tuple[int, Thing]]  # M scenes, and what is named of each


class BatchMaker:
    """Makes batches of a set of scenes.

    Args:
        sampler: draws the dialogues.
        names: all names, whose order numbers them.
        grid: G, tokens along a picture's side.
        pad_id, image_id: of the tokenizer.
    """

    def __init__(
        self, scenes: SceneSet, sampler: DialogueSampler, names: list[str], grid: int, pad_id: int, image_id: int
    ) -> None:
        self._scenes, self._sampler, self._grid = scenes, sampler, grid
        self._number = {name: number for number, name in enumerate(names)}
        self._pad_id, self._image_id = pad_id, image_id

    def draw(self, rng: np.random.Generator, scenes: np.ndarray, all_cameras: float) -> GroundingBatch:
        """A dialogue about each of ``scenes``; ``all_cameras``: share of those about all pictures, not about one."""
        cameras = len(self._scenes.description.cameras)
        made = []
        for scene in scenes:
            about_all = rng.random() < all_cameras
            shown = tuple(range(cameras)) if about_all else (int(rng.integers(cameras)),)
            made.append(self._sampler.draw(rng, int(scene), shown))
        return self._collate(made)

    def instructions(self, rng: np.random.Generator, scenes: np.ndarray) -> GroundingBatch:
        """An instruction about all pictures of each of ``scenes``."""
        cameras = tuple(range(len(self._scenes.description.cameras)))
        return self._collate([self._sampler.instruct(rng, int(scene), cameras) for scene in scenes])

    def _collate(self, made: list[Dialogue]) -> GroundingBatch:
        length = max(len(dialogue.ids) for dialogue in made)
        ids = np.full((len(made), length), self._pad_id)
        positions = np.zeros((3, len(made), length), np.int64)
        is_answer, mask = np.zeros(ids.shape, bool), np.zeros(ids.shape, bool)
        images, cameras, cells, offsets, mentions, seen, places, mentioned = [], [], [], [], [], [], [], []
        for row, dialogue in enumerate(made):
            start = length - len(dialogue.ids)
            ids[row, start:], is_answer[row, start:], mask[row, start:] = dialogue.ids, dialogue.is_answer, True
            positions[:, row, start:] = self._positions(ids[row, start:])
            pictures = np.flatnonzero(ids[row] == self._image_id)[:: self._grid**2]
            things = self._scenes.things[dialogue.scene]
            for slot, camera in enumerate(dialogue.cameras):
                images.append(self._scenes.image(dialogue.scene, camera))
                cameras.append(camera)
                cell, offset = self._cells(things, camera)
                cells.append(cell), offsets.append(offset)
                for token, thing in dialogue.mentions:
                    if thing.places[camera] is not None:
                        mentions.append((row, start + token, camera))
                        seen.append(pictures[slot] + self._cell(thing.places[camera]))
                        places.append(thing.places[camera])
                        mentioned.append((dialogue.scene, thing))
        return GroundingBatch(
            images=torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous(),
            image_camera=torch.tensor(cameras),
            input_ids=torch.from_numpy(ids),
            position_ids=torch.from_numpy(positions),
            attention_mask=torch.from_numpy(mask),
            is_answer=torch.from_numpy(is_answer),
            cell_name=torch.from_numpy(np.stack(cells)),
            nothing=len(self._number),
            cell_offset=torch.from_numpy(np.stack(offsets)),
            mention=torch.tensor(mentions, dtype=torch.int64).view(-1, 3),
            mention_seen=torch.tensor(seen, dtype=torch.int64),
            mention_place=torch.tensor(places, dtype=torch.float32).view(-1, 2),
            mentioned=mentioned,
        )

    def _positions(self, ids: np.ndarray) -> np.ndarray:
        """(3, L): text counts on by one in all three; a picture's tokens share a start, and count rows and columns."""
        per_image, side = self._grid**2, self._grid
        is_image = ids == self._image_id
        first = is_image & ~np.concatenate([[False], is_image[:-1]])
        advance = np.where(first, side, np.where(is_image, 0, 1))
        start = np.cumsum(advance) - advance
        start[is_image] = np.repeat(start[first], per_image)
        positions = np.stack([start] * 3)
        count = int(first.sum())
        positions[1, is_image] += np.tile(np.repeat(np.arange(side), side), count)
        positions[2, is_image] += np.tile(np.arange(side), side * count)
        return positions

    def _cells(self, things: list[Thing], camera: int) -> tuple[np.ndarray, np.ndarray]:
        """What lies in each cell of a picture, and where in it; small things win over what they lie on."""
        cells = np.full(self._grid**2, len(self._number))
        offsets = np.zeros((self._grid**2, 2), np.float32)
        for thing in reversed(things):  # objects come first in a scene's list, and so are written last
            if thing.places[camera] is not None:
                u, v = (share * self._grid for share in thing.places[camera])
                cell = self._cell(thing.places[camera])
                cells[cell], offsets[cell] = self._number[thing.name], (u % 1, v % 1)
        return cells, offsets

    def _cell(self, place: tuple[float, float]) -> int:
        column, row = (int(share * self._grid) for share in place)
        return row * self._grid + column
