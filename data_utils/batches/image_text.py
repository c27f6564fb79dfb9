"""Image-text pairs that a VLM trains on beside the robot's data: a JSONL file -> endless batches.

A line is ``{"image": path relative to the file, "prompt": text, "answer": text}``.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from data_utils.batches.collate import pad_prompts
from data_utils.batches.options import LoaderOptions
from data_utils.batches.workers import single_threaded, start_workers, without_traceback
from data_utils.errors import DataError
from data_utils.geometry.letterbox import fit
from data_utils.types import ImageTextBatch, TokenizedPrompt

FIELDS = ("image", "prompt", "answer")


class Tokenizer(Protocol):
    """What is asked of the policy's tokenizer."""

    pad_id: int

    def with_answer(self, prompt: str, answer: str) -> TokenizedPrompt: ...


@dataclass(frozen=True)
class Pair:
    """One line of the file."""

    image: Path
    prompt: str
    answer: str
    where: str  # file and line, for messages


def parse_line(file: Path, number: int, line: bytes) -> Pair:
    """Line ``number`` (from 1) of ``file``. Raises ``DataError`` that names both."""
    where = f"{file}:{number}"
    try:
        value = json.loads(line)
    except ValueError as error:  # also bytes that are no text
        raise DataError(f"{where} is not JSON ({error}); wanted one object per line", "schema") from error
    if not isinstance(value, dict):
        raise DataError(f"{where} is a {type(value).__name__}; wanted an object with {', '.join(FIELDS)}", "schema")
    for field in FIELDS:
        if field not in value:
            raise DataError(f"{where} has no {field!r}; wanted an object with {', '.join(FIELDS)}", "schema")
        if not isinstance(value.get(field), str) or not value[field].strip():
            raise DataError(f"{where}: {field!r} is {value.get(field)!r}; wanted a text that is not empty", "schema")
    return Pair(file.parent / value["image"], value["prompt"].strip(), value["answer"].strip(), where)


def scan_pairs(file: Path) -> np.ndarray:
    """Check all lines of a file, and that its images are there.

    Returns:
        (2, lines) int64: where each pair's line begins, and its number.
    Raises:
        DataError: the file or an image of it is missing, a line is malformed, or there is none.
    """
    starts, numbers, start = [], [], 0
    try:
        with file.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    pair = parse_line(file, number, line)
                    if not pair.image.is_file():
                        raise DataError(f"{pair.where}: there is no image {pair.image}", "location")
                    starts.append(start)
                    numbers.append(number)
                start += len(line)
    except OSError as error:
        what = f"image-text pairs {file} cannot be read ({error.strerror})"
        raise DataError(f"{what}; --image_text_pairs wants a file of JSON lines", "file") from error
    if not starts:
        raise DataError(f"{file} holds no image-text pair; wanted a JSON object per line", "file")
    return np.array([starts, numbers], np.int64)


class ImageTextPairs(Dataset):
    """The pairs of a file, all lines checked, images yet undecoded. Keeps the lines' places, not the lines.

    Args:
        file: JSONL; blank lines do not count.
        image_hw: size that images are letterboxed to.
        tokenize: of the run.
    Raises:
        DataError: the file or an image of it is missing, a line is malformed, or there is none.
    """

    def __init__(self, file: str | Path, image_hw: tuple[int, int], tokenize: Tokenizer) -> None:
        self.file, self._image_hw, self._tokenize = Path(file), image_hw, tokenize
        self._lines = scan_pairs(self.file)

    def __len__(self) -> int:
        return self._lines.shape[1]

    def __getitem__(self, index: int) -> tuple[np.ndarray, TokenizedPrompt]:
        """(3, H, W) uint8 and the tokens. Raises ``DataError`` for an image that does not decode."""
        pair = self.pair(index)
        image = cv2.imread(str(pair.image), cv2.IMREAD_COLOR)
        if image is None:
            raise DataError(f"{pair.where}: the image {pair.image} cannot be decoded; replace it", "image")
        try:
            boxed = fit(image.shape[:2], self._image_hw).image(image)
            tokens = self._tokenize.with_answer(pair.prompt, pair.answer)
        except ValueError as error:
            raise DataError(f"{pair.where}: {error}", "image") from error
        return np.ascontiguousarray(boxed[..., ::-1].transpose(2, 0, 1)), tokens

    def collate(self, items: Sequence[tuple[np.ndarray, TokenizedPrompt]]) -> ImageTextBatch:
        images, prompts = zip(*items, strict=True)
        return ImageTextBatch(torch.from_numpy(np.stack(images)), *pad_prompts(prompts, self._tokenize.pad_id))

    def pair(self, index: int) -> Pair:
        start, number = self._lines[:, index].tolist()
        with self.file.open("rb") as lines:
            lines.seek(start)
            return parse_line(self.file, number, lines.readline())


class EndlessBatches(Sampler[list[int]]):
    """Indices of this rank's batches for ever: all ranks together go through all items, each time in another order.

    A batch depends on its number, the rank and the seed alone.

    Args:
        size: number of items.
        start: number of the first batch.
    """

    def __init__(self, size: int, batch_size: int, rank: int, world_size: int, seed: int, start: int = 0) -> None:
        self.start = start
        self._size, self._batch_size, self._seed = size, batch_size, seed
        self._rank, self._world_size = rank, world_size

    def __iter__(self) -> Iterator[list[int]]:
        order = functools.lru_cache(maxsize=2)(self._order)
        number = self.start
        while True:
            first = (number * self._world_size + self._rank) * self._batch_size
            rounds = (divmod(place, self._size) for place in range(first, first + self._batch_size))
            yield [int(order(turn)[place]) for turn, place in rounds]
            number += 1

    def _order(self, turn: int) -> np.ndarray:
        return np.random.default_rng((self._seed, turn)).permutation(self._size)


def image_text_batches(
    pairs: ImageTextPairs, options: LoaderOptions, *, start: int = 0, rank: int = 0, world_size: int = 1
) -> Iterator[ImageTextBatch]:
    """Batches of one rank for ever, the same whatever ``options.workers`` is.

    Args:
        options: of these, ``weights``, ``multiplex``, ``sample_by`` and ``persistent_workers`` mean nothing here.
        start: how many batches the run has had: a resumed run goes on where it was.
        rank, world_size: this process among all that train.
    Raises:
        DataError: when it comes to an image that cannot be used, or a worker is lost.
    """
    batches = start_workers(
        DataLoader(
            pairs,
            batch_sampler=EndlessBatches(len(pairs), options.batch_size, rank, world_size, options.seed, start),
            collate_fn=pairs.collate,
            num_workers=options.workers,
            prefetch_factor=options.prefetch_factor if options.workers else None,
            pin_memory=options.pin_memory,
            timeout=options.timeout if options.workers else 0,
            worker_init_fn=single_threaded,
            generator=torch.Generator().manual_seed(options.seed),  # else a number would go from torch's global stream
        )
    )
    while True:
        try:
            yield next(batches)
        except DataError as error:
            raise without_traceback(error) from error
        except RuntimeError as error:
            if "DataLoader" not in str(error):
                raise
            raise DataError(f"a loader of image-text pairs was lost: {str(error).splitlines()[0]}", "file") from error
