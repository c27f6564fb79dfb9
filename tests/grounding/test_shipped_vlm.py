"""The small VLM that comes with the library, on scenes that are rendered now."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

from apt.grounding.batches import BatchMaker
from apt.grounding.dialogues import DialogueSampler
from apt.grounding.losses import GroundingModel
from apt.grounding.scenes import SceneSet, SetDescription, write_part
from apt.grounding.training import IMAGE_STATISTICS, measure
from apt.model.encoders import hub

FOLDER = Path(__file__).parents[2] / "assets/models/blocks_vlm"
BINS = 48


@pytest.mark.sim
@pytest.mark.skipif(importlib.util.find_spec("robosuite") is None, reason="the simulator is not installed")
def test_it_says_where_named_things_are_on_scenes_of_another_seed(tmp_path):
    from examples.blocks.env import BlocksEnv
    from examples.blocks.scenes import scenes as rendered

    with BlocksEnv("SO", image_size=128) as env:
        sentences = (*env.world.instructions, *env.world.unseen_instructions)
        description = SetDescription(tuple(env.world.cameras), 128, sentences)
        part = write_part(tmp_path, 0, description, 48, rendered(env, np.random.default_rng(99)))
    scenes = SceneSet([part])
    tokenizer = hub.load_tokenizer(str(FOLDER))
    model = GroundingModel(
        hub.load_model(str(FOLDER), torch.float32), IMAGE_STATISTICS, 40, 2, BINS, looking_layer=1
    ).eval()
    sampler = DialogueSampler(scenes, tokenizer, 64, BINS)
    maker = BatchMaker(scenes, sampler, scenes.names(), 8, tokenizer.pad_token_id, model.model.config.image_token_id)
    with torch.inference_mode():
        batch = maker.draw(np.random.default_rng(0), np.arange(48), all_cameras=0.5)
        found = {
            name: float(values.float().mean())
            for name, values in measure(model(batch), batch, tokenizer, BINS, scenes.description.cameras)
        }
    assert found["word_u"] > 0.8 and found["word_v"] > 0.8 and found["text"] > 0.8, found


def test_it_is_small_and_says_how_good_it_is():
    sizes = {path.name: path.stat().st_size for path in FOLDER.iterdir()}
    assert sizes["model.safetensors"] < 4e6 and sum(sizes.values()) < 5e6
    assert "training.pt" not in sizes and "point_u" in (FOLDER / "README.md").read_text(encoding="utf-8")
