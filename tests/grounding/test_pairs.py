"""Image-text pairs about rendered scenes: what is asked is shown, and the answer is where it is."""

import json
import re

import numpy as np
import pytest

from apt.grounding.pairs import PAIRS_FILE, main
from apt.grounding.scenes import SceneSet, SetDescription, Thing, parts_of, write_part
from apt.model.encoders.hub import load_tokenizer
from apt.model.encoders.prompts import PromptTokenizer
from data_utils.batches.image_text import ImageTextPairs

SIZE, BINS = 64, 48
NAMES = ("red cube", "blue bar", "red tray")


def draw_scenes(seed):
    rng = np.random.default_rng(seed)
    while True:
        things = [
            Thing(
                name,
                "container" if name.endswith("tray") else "object",
                tuple(tuple(rng.uniform(0, 1, 2)) if rng.random() < 0.7 else None for _ in range(2)),
            )
            for name in NAMES
        ]
        yield rng.integers(0, 255, (2, SIZE, SIZE, 3)).astype(np.uint8), things


@pytest.fixture
def scenes(tmp_path):
    description = SetDescription(("fixed", "wrist"), SIZE, ("put the {object} in the {container}", "take the {object}"))
    for number in range(2):
        write_part(tmp_path / "scenes", number, description, 40, draw_scenes(number))
    return tmp_path / "scenes"


def place_words(place):
    return "<x{}><y{}>".format(*(int(share * BINS) for share in place))


def test_a_pair_asks_for_things_in_its_picture_and_is_answered_with_their_places(scenes, tmp_path):
    assert main(["--scenes", str(scenes), "--out", str(tmp_path / "pairs")]) == 0
    judged_apart = SceneSet(parts_of(scenes)[1:])
    lines = [json.loads(line) for line in (tmp_path / "pairs" / PAIRS_FILE).read_text().splitlines()]
    kinds = {"where": 0, "put": 0, "take": 0}
    for line in lines:
        scene, camera = re.fullmatch(r"images/(\d+)_(\w+)\.png", line["image"]).groups()
        things, number = judged_apart.things[int(scene)], ("fixed", "wrist").index(camera)
        places = {thing.name: thing.places[number] for thing in things}
        named = sorted((name for name in NAMES if name in line["prompt"]), key=line["prompt"].index)
        assert line["answer"] == "".join(place_words(places[name]) for name in named)
        kinds[line["prompt"].split()[0]] += 1
    assert all(count > 5 for count in kinds.values())


def test_pairs_reach_a_policys_training_as_the_vlms_own_words_for_places(scenes, tmp_path):
    main(["--scenes", str(scenes), "--out", str(tmp_path / "pairs")])
    tokenizer = load_tokenizer("blocks")
    tokenize = PromptTokenizer(tokenizer, "<|image_pad|>", (SIZE // 16, SIZE // 16))
    pairs = ImageTextPairs(tmp_path / "pairs" / PAIRS_FILE, (SIZE, SIZE), tokenize)
    image, tokens = pairs[0]
    pair = pairs.pair(0)
    assert pair.prompt.startswith("where is the ")
    assert tokens.num_targets == 3  # column, row, end of the turn
    assert "".join(tokenizer.convert_ids_to_tokens(tokens.ids[-3:-1].tolist())) == pair.answer
    shown = SceneSet(parts_of(scenes)[1:])
    scene, camera = re.fullmatch(r"(\d+)_(\w+)\.png", pair.image.name).groups()
    expected = shown.image(int(scene), ("fixed", "wrist").index(camera))
    np.testing.assert_array_equal(image.transpose(1, 2, 0), expected)


def test_pairs_without_scenes_end_in_one_line(tmp_path, capsys):
    assert main(["--scenes", str(tmp_path), "--out", str(tmp_path / "pairs")]) == 2
    assert capsys.readouterr().err.startswith("error: no scenes")
    assert not (tmp_path / "pairs").exists()
