"""A linear probe finds a place where a layer has it, and nowhere else."""

import re

import numpy as np
import pytest
import torch

from apt.grounding.architecture import SmallVLM, build, make_tokenizer
from apt.grounding.batches import BatchMaker
from apt.grounding.dialogues import DialogueSampler
from apt.grounding.probe import BINS, Probe, linear_probe, main, rivals, share_apart, share_within
from apt.grounding.scenes import SceneSet, SetDescription, parts_of, write_part
from apt.grounding.training import IMAGE_STATISTICS
from apt.model.encoders.prompts import PromptTokenizer
from apt.model.encoders.qwen3vl import Qwen3VLEncoder
from tests.grounding.test_grounding import NAMES, SENTENCES, SIZE, draw_scenes
from train_utils.errors import ConfigError

SIZES = SmallVLM(width=64, layers=3, heads=2, kv_heads=1, vision_width=32, vision_layers=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("scenes")
    for number in range(2):
        write_part(path, number, SetDescription(("fixed", "wrist"), SIZE, SENTENCES), 40, draw_scenes(number))
    return path


def codes(places: torch.Tensor, noise: float) -> torch.Tensor:
    """(M, 64) features that tell places (M, 2) linearly, mixed with some that tell nothing."""
    rng = torch.Generator().manual_seed(0)
    centres = (torch.arange(24) + 0.5) / 24
    bumps = torch.exp(-0.5 * ((places.unsqueeze(-1) - centres) * 24) ** 2).flatten(1)
    features = torch.cat([bumps, torch.randn(len(places), 16, generator=rng)], dim=1)
    return (features + noise * torch.randn(features.shape, generator=rng)) @ torch.randn(64, 64, generator=rng)


def test_a_place_that_is_in_the_features_is_found_and_one_that_is_not_stays_chance():
    places = torch.rand(800, 2, generator=torch.Generator().manual_seed(1))
    fitted, asked = slice(0, 600), slice(600, 800)
    found = {}
    for noise in (0.01, 3.0):
        told = linear_probe(codes(places, noise)[fitted], places[fitted], codes(places, noise)[asked], BINS)
        found[noise] = share_within(told, places[asked], BINS)
    assert found[0.01] > 0.8 and found[3.0] < 0.1


def test_every_layer_of_a_model_is_probed_in_every_cameras_picture(folder):
    tokenizer = make_tokenizer((*NAMES, *SENTENCES), BINS)
    encoder = Qwen3VLEncoder(build(SIZES, tokenizer, SIZE, seed=0).eval(), *IMAGE_STATISTICS)
    probe = Probe(folder)
    found = probe.places_known(encoder, tokenizer, range(3))
    assert probe.cameras == ("fixed", "wrist")
    assert set(found) == {0, 1, 2} and all(len(shares) == 2 for shares in found.values())
    assert found == Probe(folder).places_known(encoder, tokenizer, range(3)), "the same questions"
    assert all(0 <= one.within <= 0.5 for known in found.values() for one in known), "nothing has learned here"


def test_a_thing_is_told_apart_where_the_place_is_nearer_to_it_than_to_others_of_its_kind():
    places, told = torch.tensor([[0.3, 0.5]] * 3), torch.tensor([[3, 5], [3, 5], [7, 5]])
    others = [torch.tensor([[0.8, 0.5]]), torch.empty(0, 2), torch.tensor([[0.8, 0.5], [0.1, 0.1]])]
    assert share_apart(told, places, others, bins=10) == pytest.approx(2 / 3)
    assert share_apart(told[:0], places[:0], [], bins=10) == 0


def test_rivals_are_the_other_things_of_a_kind_in_the_same_picture(folder):
    scenes = SceneSet(parts_of(folder))
    tokenizer = make_tokenizer((*NAMES, *SENTENCES), BINS)
    sampler = DialogueSampler(scenes, tokenizer, (SIZE // 16) ** 2, BINS)
    maker = BatchMaker(scenes, sampler, scenes.names(), SIZE // 16, 0, tokenizer.convert_tokens_to_ids("<|image_pad|>"))
    batch = maker.instructions(np.random.default_rng(0), np.arange(len(scenes)))
    for (sequence, _, camera), place, (scene, thing) in zip(
        batch.mention.tolist(), batch.mention_place, batch.mentioned, strict=True
    ):
        assert scene == sequence
        shown = {thing.name: thing.places[camera] for thing in scenes.things[sequence] if thing.places[camera]}
        (name,) = (name for name, there in shown.items() if np.allclose(there, place))
        others = [shown[other] for other in NAMES[:2] if other in shown and other != name] if "cube" in name else []
        found = rivals(scenes.things[scene], thing, camera)
        assert thing.name == name
        np.testing.assert_allclose(found.numpy(), np.reshape(others, (-1, 2)), rtol=1e-6)


def test_an_instruction_is_what_a_policy_gets_and_ends_before_any_answer(folder):
    scenes = SceneSet(parts_of(folder))
    tokenizer = make_tokenizer((*NAMES, *SENTENCES), BINS)
    sampler = DialogueSampler(scenes, tokenizer, (SIZE // 16) ** 2, BINS)
    made = sampler.instruct(np.random.default_rng(0), 3, (0, 1))
    said = re.search(r"<\|vision_end\|>(?!<)(.*?)<\|im_end\|>", tokenizer.decode(made.ids))[1]
    policys = PromptTokenizer(tokenizer, "<|image_pad|>", (SIZE // 16, SIZE // 16))(said, 2)
    assert made.ids == policys.ids.tolist() and not any(made.is_answer)
    for token, thing in made.mentions:
        assert tokenizer.decode(made.ids[: token + 1]).endswith(thing.name)


def test_what_cannot_be_probed_is_refused_in_one_line(tmp_path, capsys):
    with pytest.raises(ConfigError, match="0 parts; wanted two at least"):
        Probe(tmp_path)
    assert main(["--vlm", "blocks", "--scenes", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("error: ")
