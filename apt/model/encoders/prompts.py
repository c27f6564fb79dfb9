"""Prompts to the tokens and positions that Qwen3-VL reads. Runs in the loader's workers, cached per prompt."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np

from data_utils.prompts import one_spaced
from data_utils.types import TokenizedPrompt

_CACHE_SIZE = 65536
_PLACE = "the prompt comes here"  # in a turn as the chat template makes it


class PromptTokenizer:
    """One user turn: the shown cameras' images in order, then the text, with the generation prompt appended.

    Args:
        tokenizer: a Hugging Face tokenizer with a chat template.
        image_token: the placeholder's text, e.g. ``<|image_pad|>``.
        grid: rows and columns of an image's tokens after merging.
        vision_only: end the sequence with the last image (paper's Stage 1, which never shows the prompt).
    """

    def __init__(self, tokenizer, image_token: str, grid: tuple[int, int], vision_only: bool = False) -> None:
        self._tokenizer = tokenizer
        self._image_id = tokenizer.convert_tokens_to_ids(image_token)
        self._grid = grid
        self._vision_only = vision_only
        self._cache: OrderedDict[tuple[str, int], TokenizedPrompt] = OrderedDict()

    @property
    def pad_id(self) -> int:
        return self._tokenizer.pad_token_id if self._tokenizer.pad_token_id is not None else 0

    def __call__(self, prompt: str, num_images: int) -> TokenizedPrompt:
        """``prompt`` is text whatever it holds: what looks like a control token is spelt out in tokens of text."""
        key = ("" if self._vision_only else one_spaced(prompt), num_images)
        if key in self._cache:
            self._cache.move_to_end(key)
            return self._cache[key]
        tokens = self._tokenize(*key)
        self._cache[key] = tokens
        if len(self._cache) > _CACHE_SIZE:
            self._cache.popitem(last=False)
        return tokens

    def with_answer(self, prompt: str, answer: str) -> TokenizedPrompt:
        """A turn with one image, then the assistant's answer up to the token that ends its turn: these are targets."""
        turn = self._tokenize(one_spaced(prompt), 1)
        ids = [*self._plain(answer), self._tokenizer.eos_token_id]
        positions = turn.position_ids[:, -1:] + 1 + np.arange(len(ids))  # the turn ends with text: all three agree
        return TokenizedPrompt(
            ids=np.concatenate([turn.ids, np.array(ids, np.int64)]),
            position_ids=np.concatenate([turn.position_ids, positions], axis=1),
            num_targets=len(ids),
        )

    def _plain(self, text: str) -> list[int]:
        """Tokens of a text that is data: none of them controls anything."""
        return self._tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]

    def _tokenize(self, prompt: str, num_images: int) -> TokenizedPrompt:
        content = [{"type": "image"}] * num_images + [{"type": "text", "text": _PLACE}]
        turn = self._tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        before, after = (self._tokenizer(part, add_special_tokens=False)["input_ids"] for part in turn.split(_PLACE))
        ids = np.asarray([*before, *self._plain(prompt), *after], dtype=np.int64)
        is_image = ids == self._image_id
        if self._vision_only:
            end = int(np.flatnonzero(is_image)[-1]) + 1 if num_images else 1
            ids, is_image = ids[:end], is_image[:end]

        rows, columns = self._grid
        per_image = rows * columns
        repeats = np.where(is_image, per_image, 1)
        # A text token takes one position, an image as many as its longer side; within it, rows and columns count.
        advance = np.where(is_image, max(rows, columns), 1)
        start = np.repeat(np.cumsum(advance) - advance, repeats)
        inside = np.zeros((3, len(start)), dtype=np.int64)
        image_slots = np.repeat(is_image, repeats)
        inside[1, image_slots] = np.tile(np.repeat(np.arange(rows), columns), num_images)
        inside[2, image_slots] = np.tile(np.arange(columns), rows * num_images)
        ids = np.repeat(ids, repeats)
        # The text behind the last image; without one, all but the first token, which nothing comes before.
        num_targets = len(ids) - 1 - int(np.flatnonzero(image_slots).max(initial=0))
        return TokenizedPrompt(ids=ids, position_ids=start + inside, num_targets=num_targets)
