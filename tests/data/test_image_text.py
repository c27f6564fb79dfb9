"""Image-text pairs: what a line becomes, which pairs a step gets, and what is refused."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from apt.model.encoders.hub import load_model, load_tokenizer
from apt.model.encoders.prompts import PromptTokenizer
from data_utils.batches.image_text import EndlessBatches, ImageTextPairs, image_text_batches
from data_utils.batches.options import LoaderOptions
from data_utils.errors import DataError

HW = (64, 64)
GRID = (4, 4)  # of tokens, for the tiny model's 16 pixels per token


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("tiny")


@pytest.fixture(scope="module")
def tokenize(tokenizer) -> PromptTokenizer:
    return PromptTokenizer(tokenizer, "<|image_pad|>", GRID)


def write_pairs(folder: Path, count: int = 6) -> Path:
    """Images of one colour each in a folder beside the file, asked for by name; every size is another."""
    (folder / "images").mkdir(parents=True)
    lines = []
    for index in range(count):
        red = index % 2 == 0
        image = np.full((40 + 8 * index, 64, 3), (0, 0, 255) if red else (255, 0, 0), np.uint8)  # BGR
        assert cv2.imwrite(str(folder / f"images/{index}.png"), image)
        answer = "red" if red else "blue"
        lines.append({"image": f"images/{index}.png", "prompt": f"what is on table {index}", "answer": answer})
    file = folder / "pairs.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def batches(pairs: ImageTextPairs, **changes):
    place = {name: changes.pop(name) for name in ("start", "rank", "world_size") if name in changes}
    return image_text_batches(pairs, LoaderOptions(**{"batch_size": 2, **changes}), **place)


def test_a_pair_is_a_turn_of_the_chat_template_whose_targets_are_the_answer_and_the_end_of_the_turn(
    tokenize, tokenizer
):
    tokens = tokenize.with_answer("what is on the table", "a red bowl")
    turns = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is on the table"}]},
        {"role": "assistant", "content": "a red bowl"},
    ]
    text = tokenizer.apply_chat_template(turns, tokenize=False).replace("<|image_pad|>", "<|image_pad|>" * 16)
    assert tokenizer.decode(tokens.ids) == text.removesuffix("\n")
    assert tokenizer.decode(tokens.ids[-tokens.num_targets :]) == "a red bowl<|im_end|>"


def test_positions_go_on_behind_the_answer_as_hugging_faces_do(tokenize):
    tokens = tokenize.with_answer("what is it", "a can")
    model = load_model("tiny", torch.float32)
    ids = torch.from_numpy(tokens.ids)[None]
    is_image = (ids == model.config.image_token_id).int()
    wanted, _ = model.model.get_rope_index(ids, mm_token_type_ids=is_image, image_grid_thw=torch.tensor([[1, 8, 8]]))
    assert torch.equal(torch.from_numpy(tokens.position_ids), wanted[:, 0])


def test_images_are_letterboxed_rgb_and_belong_to_their_text(tmp_path, tokenize, tokenizer):
    pairs = ImageTextPairs(write_pairs(tmp_path), HW, tokenize)
    batch = next(batches(pairs, batch_size=6))
    assert batch.images.dtype == torch.uint8 and batch.images.shape == (6, 3, *HW)
    for image, ids, count in zip(batch.images, batch.input_ids, batch.targets.counts, strict=True):
        answer = tokenizer.decode(ids[-int(count) :]).removesuffix("<|im_end|>")
        middle = image[:, 32, 32].tolist()
        assert middle == {"red": [255, 0, 0], "blue": [0, 0, 255]}[answer]
    narrow = pairs[0][0]  # 40 x 64: black above and below
    assert not narrow[:, 0].any() and not narrow[:, -1].any() and narrow[0, 32].all()
    assert batch.targets.longest == int(batch.targets.counts.max())


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 17), st.integers(1, 5), st.integers(1, 3), st.integers(0, 2**31))
def test_ranks_together_go_through_all_pairs_before_one_comes_again(size, batch_size, world_size, seed):
    ranks = [iter(EndlessBatches(size, batch_size, rank, world_size, seed)) for rank in range(world_size)]
    steps = -(-3 * size // (batch_size * world_size))
    places = [index for _ in range(steps) for rank in ranks for index in next(rank)]
    for first in range(0, 3 * size, size):
        assert sorted(places[first : first + size]) == list(range(size))


def test_a_loader_that_starts_later_goes_on_as_the_first_would_and_rounds_differ():
    def take(start, count, seed=0):
        return list(itertools.islice(EndlessBatches(50, 4, 1, 2, seed, start), count))

    assert take(0, 40)[23:] == take(23, 17)
    assert take(0, 25) != take(25, 25), "the second round has another order"
    assert take(0, 5) != take(0, 5, seed=1)


def test_workers_do_not_change_what_a_step_gets(tmp_path, tokenize):
    pairs = ImageTextPairs(write_pairs(tmp_path), HW, tokenize)
    alone, by_workers = ([next(source) for _ in range(4)] for source in (batches(pairs), batches(pairs, workers=2)))
    for one, other in zip(alone, by_workers, strict=True):
        assert torch.equal(one.images, other.images) and torch.equal(one.input_ids, other.input_ids)
    seen = Counter(text for batch in alone for text in map(bytes, batch.images.numpy()))
    assert len(seen) == 6 and max(seen.values()) == 2


GOOD = {"image": "images/0.png", "prompt": "what is it", "answer": "red"}


@pytest.mark.parametrize(
    "line, message",
    [
        ("{", r"pairs\.jsonl:7 is not JSON"),
        ("[1]", r"pairs\.jsonl:7 is a list; wanted an object with image, prompt, answer"),
        (
            json.dumps({"image": "images/0.png", "prompt": "x"}),
            r"pairs\.jsonl:7 has no 'answer'; wanted an object with image, prompt, answer",
        ),
        (json.dumps({**GOOD, "prompt": "  "}), r"pairs\.jsonl:7: 'prompt' is '  '; wanted a text"),
        (json.dumps({**GOOD, "answer": 3}), r"pairs\.jsonl:7: 'answer' is 3"),
        (json.dumps({**GOOD, "image": "images/no.png"}), r"pairs\.jsonl:7: there is no image .*images/no\.png"),
    ],
)
def test_a_bad_line_is_named_at_the_start(tmp_path, tokenize, line, message):
    file = write_pairs(tmp_path)
    file.write_text(file.read_text() + line + "\n")
    with pytest.raises(DataError, match=message):
        ImageTextPairs(file, HW, tokenize)


def test_a_missing_and_an_empty_file_are_named(tmp_path, tokenize):
    with pytest.raises(DataError, match=r"none\.jsonl cannot be read .*--image_text_pairs"):
        ImageTextPairs(tmp_path / "none.jsonl", HW, tokenize)
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(DataError, match=r"empty\.jsonl holds no image-text pair"):
        ImageTextPairs(tmp_path / "empty.jsonl", HW, tokenize)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_does_not_decode_is_named_when_its_turn_comes(tmp_path, tokenize, workers):
    file = write_pairs(tmp_path, 3)
    (tmp_path / "images/1.png").write_bytes(b"no image")
    pairs = ImageTextPairs(file, HW, tokenize)
    with pytest.raises(DataError, match=r"^\S*pairs\.jsonl:2: the image \S*images/1\.png cannot be decoded"):
        list(itertools.islice(batches(pairs, workers=workers), 3))
