"""A small vision-language model: its dialogues, its training, and the folder it leaves."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from apt.grounding.__main__ import main
from apt.grounding.architecture import SmallVLM, make_tokenizer
from apt.grounding.batches import BatchMaker
from apt.grounding.dialogues import QUESTIONS, DialogueSampler
from apt.grounding.scenes import SceneSet, SetDescription, Thing, parts_of, write_part
from apt.grounding.training import GroundingConfig, GroundingRun
from apt.model.config import VLAConfig
from apt.model.encoders.prompts import PromptTokenizer
from apt.model.vla import VLA
from data_utils.errors import DataError
from train_utils.errors import ConfigError

NAMES = ("red cube", "blue cube", "red tray")
SIZE, BINS = 64, 8
KINDS = ("put the", "take the", "where is the", "what is at", "what is there")
SENTENCES = ("put the {object} in the {container}", "take the {object}")
SIZES = SmallVLM(width=64, layers=2, heads=2, kv_heads=1, vision_width=32, vision_layers=1, bins=BINS)


def draw_scenes(seed):
    """Flat squares of a name's colour, where its place says."""
    rng = np.random.default_rng(seed)
    while True:
        images = rng.integers(0, 60, (2, SIZE, SIZE, 3)).astype(np.uint8)
        things = []
        for name in NAMES:
            places = tuple(tuple(rng.uniform(0.1, 0.9, 2)) if rng.random() < 0.9 else None for _ in range(2))
            for camera, place in enumerate(places):
                if place is not None:
                    column, row = (int(share * SIZE) for share in place)
                    colour = (250, 20, 20) if name.startswith("red") else (20, 20, 250)
                    images[camera, max(0, row - 4) : row + 4, max(0, column - 4) : column + 4] = colour
            things.append(Thing(name, "container" if name.endswith("tray") else "object", places))
        yield images, things


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("scenes")
    description = SetDescription(("fixed", "wrist"), SIZE, SENTENCES)
    for number in range(2):
        write_part(path, number, description, 12, draw_scenes(number))
    return path


@pytest.fixture(scope="module")
def sampled(folder):
    scenes = SceneSet(parts_of(folder))
    tokenizer = make_tokenizer((*NAMES, *SENTENCES, "where is the what at there none"), BINS)
    return scenes, tokenizer, DialogueSampler(scenes, tokenizer, (SIZE // 16) ** 2, BINS)


def text_of(tokenizer, dialogue):
    return tokenizer.decode([t for t in dialogue.ids if t != tokenizer.convert_tokens_to_ids("<|image_pad|>")])


def test_a_dialogue_reads_as_the_policys_prompt_does_and_answers_with_places(sampled):
    scenes, tokenizer, sampler = sampled
    rng = np.random.default_rng(1)
    seen = set()
    for scene in range(len(scenes)):
        dialogue = sampler.draw(rng, scene, (0, 1))
        said = text_of(tokenizer, dialogue)
        assert said.startswith("<|im_start|>user\n<|vision_start|><|vision_end|>" + "<|vision_start|><|vision_end|>")
        assert said.count("<|im_start|>assistant\n") == QUESTIONS and said.endswith("<|im_end|>")
        for token, thing in dialogue.mentions:
            assert tokenizer.decode(dialogue.ids[: token + 1]).endswith(f" {thing.name}")
        seen |= {kind for kind in KINDS if kind in said}
        answered = tokenizer.decode([t for t, answer in zip(dialogue.ids, dialogue.is_answer, strict=True) if answer])
        assert "<x" in answered or "none" in answered or "cube" in answered
    assert len(seen) == 5


def test_positions_are_those_of_the_policys_own_tokenizer(sampled):
    scenes, tokenizer, sampler = sampled
    maker = BatchMaker(scenes, sampler, sorted(NAMES), SIZE // 16, tokenizer.pad_token_id, 5)
    prompt = PromptTokenizer(tokenizer, "<|image_pad|>", (SIZE // 16, SIZE // 16))(
        "put the red cube in the red tray", 2
    )
    assert tokenizer.convert_tokens_to_ids("<|image_pad|>") == 5
    np.testing.assert_array_equal(maker._positions(prompt.ids), prompt.position_ids)


def test_targets_of_a_batch_say_where_things_are(sampled):
    scenes, tokenizer, sampler = sampled
    maker = BatchMaker(scenes, sampler, sorted(NAMES), SIZE // 16, tokenizer.pad_token_id, 5)
    batch = maker.draw(np.random.default_rng(2), np.arange(6), all_cameras=1.0)
    assert batch.images.shape == (12, 3, SIZE, SIZE) and batch.images.dtype == torch.uint8
    assert (batch.input_ids == 5).sum() == 12 * 16
    for scene in range(6):
        for camera in range(2):
            cells = batch.cell_name[2 * scene + camera]
            places = {thing.name: thing.places[camera] for thing in scenes.things[scene] if thing.places[camera]}
            for cell in torch.nonzero(cells < len(NAMES)).flatten().tolist():
                u, v = places[sorted(NAMES)[cells[cell]]]
                assert cell == int(v * 4) * 4 + int(u * 4)
                offset = batch.cell_offset[2 * scene + camera, cell].numpy()
                np.testing.assert_allclose(offset, [u * 4 % 1, v * 4 % 1], atol=1e-6)
    assert (batch.mention_place >= 0).all() and (batch.mention_place < 1).all()
    for (row, _, slot), token, (u, v) in zip(
        batch.mention.tolist(), batch.mention_seen.tolist(), batch.mention_place.tolist(), strict=True
    ):
        pictures = torch.nonzero(batch.input_ids[row] == 5).flatten().view(2, 4, 4)
        assert token == pictures[slot, int(v * 4), int(u * 4)]


def test_where_a_name_looks_is_what_that_layers_own_attention_says(folder, tmp_path, monkeypatch):
    run = GroundingRun(config_of(folder, tmp_path, all_cameras=1.0))
    batch, model = run._batch(run.train, 0, 4), run.model.eval()
    asked = []

    def attend(q, k, v, attn_mask=None, scale=None, plain=torch.nn.functional.scaled_dot_product_attention, **options):
        asked.append((q, k, attn_mask, scale))
        return plain(q, k, v, attn_mask=attn_mask, scale=scale, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attend)
    with torch.inference_mode():
        looked = model(batch).looked
    q, k, mask, scale = [call for call in asked if call[0].shape[2] == batch.input_ids.shape[1]][1]  # of two layers
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    shares = (q @ k.transpose(-1, -2) * scale).masked_fill(~mask, float("-inf")).softmax(-1)
    heads = {0: 0, 1: 1}  # of the two cameras
    for share, (row, token, camera), cell in zip(
        looked, batch.mention.tolist(), batch.mention_seen.tolist(), strict=True
    ):
        assert share == pytest.approx(float(shares[row, heads[camera], token, cell]), rel=1e-4)


def config_of(folder, out, **changes):
    fields = {"steps": 6, "batch": 4, "judge_every": 3, "all_cameras": 0.5, "sizes": SIZES, "threads": 1}
    fields |= {"looking_layer": 1, "vision_steps": 4}
    return GroundingConfig(folder, out, **{**fields, **changes})


def test_a_stopped_training_goes_on_to_the_same_weights(folder, tmp_path):
    GroundingRun(config_of(folder, tmp_path / "whole")).run()
    stopped = GroundingRun(config_of(folder, tmp_path / "stopped"))

    class Stopped(Exception):
        pass

    def stop_after_the_first(save=stopped._save):
        save()
        raise Stopped

    stopped._save = stop_after_the_first
    with pytest.raises(Stopped):
        stopped.run()
    again = GroundingRun(config_of(folder, tmp_path / "stopped"))
    assert again.step == 3
    again.run()
    whole, other = (
        torch.load(tmp_path / name / "training.pt", weights_only=True)["model"] for name in ("whole", "stopped")
    )
    assert whole.keys() == other.keys() and all(torch.equal(whole[name], other[name]) for name in whole)
    lines = (tmp_path / "stopped/progress.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [3, 6, 9, 10]
    with pytest.raises(ConfigError, match="of a run with other settings"):
        GroundingRun(config_of(folder, tmp_path / "stopped", lr=1e-2))


def test_the_folder_it_leaves_is_a_vlm_like_any_other(folder, tmp_path, capsys):
    arguments = (
        f"--scenes {folder} --out {tmp_path / 'vlm'} --vision-steps 1 --steps 2 --batch 2 --judge-every 2 --threads 1 "
        "--looking-layer 1"
    )
    sizes = [f"--sizes.{name.replace('_', '-')}={value}" for name, value in dataclasses.asdict(SIZES).items()]
    assert main([*arguments.split(), *sizes]) == 0
    assert "points to held-out names to within a bin in" in capsys.readouterr().out
    assert (tmp_path / "vlm/README.md").read_text().count("point_u") >= 2
    vlm = VLA(VLAConfig(model="tiny", vlm=str(tmp_path / "vlm"), vlm_layer_stride=1, num_future=4)).vlm
    assert {parameter.dtype for parameter in vlm.parameters()} == {torch.float32}
    tokens = vlm.prompt_tokenizer((SIZE, SIZE))("put the red cube in the red tray", 2)
    assert len(tokens.ids) < 2 * 16 + 24  # every word is a token or two


def test_a_training_goes_on_from_an_earlier_model_of_the_same_sizes(folder, tmp_path):
    first = GroundingRun(config_of(folder, tmp_path / "first"))
    first.run()
    second = GroundingRun(config_of(folder, tmp_path / "second", init=tmp_path / "first"))
    kept, taken = first.model.model.state_dict(), second.model.model.state_dict()
    assert all(torch.equal(taken[name], kept[name].to(torch.bfloat16).float()) for name in kept)
    assert second.tokenizer.get_vocab() == first.tokenizer.get_vocab()
    wider = dataclasses.replace(SIZES, layers=3)
    with pytest.raises(ConfigError, match="first has layers 2 for 3; give these sizes"):
        GroundingRun(config_of(folder, tmp_path / "third", init=tmp_path / "first", sizes=wider))
    with pytest.raises(ConfigError, match="has no words for places such as <x8>"):
        GroundingRun(
            config_of(folder, tmp_path / "third", init=tmp_path / "first", sizes=dataclasses.replace(SIZES, bins=99))
        )


def test_a_few_hundred_steps_teach_where_a_coloured_square_is(folder, tmp_path):
    lengths = {"vision_steps": 0, "steps": 60, "judge_every": 60}
    run = GroundingRun(config_of(folder, tmp_path, **lengths, batch=8, lr=3e-3, all_cameras=0.0))
    before = run.judge()
    after = run.run()
    assert after["loss"] < 0.75 * before["loss"] and after["text"] > before["text"] + 0.2
    assert after["look_fixed"] > 2 * before["look_fixed"]


def test_the_vision_tower_learns_what_it_sees_before_the_decoder_learns_at_all(folder, tmp_path):
    lengths = {"vision_steps": 60, "steps": 1, "judge_every": 100}  # the one step begins at a rate of 0
    run = GroundingRun(config_of(folder, tmp_path, **lengths, batch=8, lr=3e-3))
    batch = run._batch(run.train, 0, 8)
    before = run.model.seeing_loss(batch).item()
    decoder = {name: tensor.clone() for name, tensor in run.model.model.model.language_model.state_dict().items()}
    assert {"see_fixed", "see_wrist"} <= run.run().keys()
    assert run.model.seeing_loss(batch).item() < 0.7 * before
    assert all(map(torch.equal, decoder.values(), run.model.model.model.language_model.state_dict().values()))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda part: (part / "things.jsonl").write_text(""), "images .* do not fit 0 lines of things"),
        (lambda part: (part / "images.npy").write_bytes(b"no array"), "is no part of a set of scenes"),
        (lambda part: (part / "scenes.json").write_text('{"version": 9}'), "is of another version"),
    ],
)
def test_a_damaged_part_is_named(folder, tmp_path, spoil, message):
    import shutil

    shutil.copytree(folder, tmp_path / "copy")
    spoil(tmp_path / "copy" / "part_00001")
    with pytest.raises(DataError, match=f"part_00001: .*{message}"):
        SceneSet(parts_of(tmp_path / "copy"))


def test_no_scenes_and_wrong_flags_are_one_line(tmp_path, capsys):
    assert main(["--scenes", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "has 0 parts; wanted two at least" in capsys.readouterr().err
    assert main(["--scenes", str(tmp_path), "--out", str(tmp_path / "out"), "--steps", "0"]) == 2
    assert "--steps is 0; it must be at least 1" in capsys.readouterr().err
