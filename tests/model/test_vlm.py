"""The VLM bridge against Hugging Face's own processor and model."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from apt.model.encoders.hub import VLMLoadError, load_config, load_model, load_tokenizer, resolve
from apt.model.encoders.prompts import PromptTokenizer
from apt.model.encoders.vision_tower import patchify
from apt.model.experts.base import Modality, VLMReads
from apt.model.vlm import VLM, position_1d, token_coordinates
from data_utils.geometry.letterbox import norm_xy
from tests.model.helpers import as_two_frames, make_observation, run_hugging_face

PATCH = 8  # of the tiny model
PIXELS = 2 * PATCH
CONTROL = ["<|image_pad|>", "<|vision_start|>", "<|vision_end|>", "<|im_start|>", "<|im_end|>"]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("tiny")


@pytest.fixture(scope="module")
def processor():
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    return Qwen2VLImageProcessorPil.from_pretrained(resolve("tiny"))


def test_patches_equal_hugging_faces_image_processor(processor):
    images = np.random.default_rng(0).integers(0, 256, (3, 256, 288, 3), dtype=np.uint8)
    wanted = processor([Image.fromarray(image) for image in images], return_tensors="pt")["pixel_values"]
    mean, std = torch.tensor(processor.image_mean), torch.tensor(processor.image_std)
    patches = patchify(torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), PATCH, 2, mean, std)
    torch.testing.assert_close(as_two_frames(patches), wanted.float(), atol=1e-6, rtol=0)


def test_prompt_tokens_are_the_chat_template_with_every_image_expanded(tokenizer):
    tokens = PromptTokenizer(tokenizer, "<|image_pad|>", (8, 8))("pick up the milk", 2)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}] * 2 + [{"type": "text", "text": "pick up the milk"}]}],
        tokenize=False,
        add_generation_prompt=True,
    )
    expanded = text.replace("<|image_pad|>", "<|image_pad|>" * 64)
    assert tokens.ids.tolist() == tokenizer(expanded, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("grid", [(8, 8), (4, 6)])
@pytest.mark.parametrize("images", [1, 3])
def test_multimodal_positions_equal_hugging_faces(tokenizer, grid, images):
    tokens = PromptTokenizer(tokenizer, "<|image_pad|>", grid)("put it down", images)
    model = load_model("tiny", torch.float32)
    ids = torch.from_numpy(tokens.ids)[None]
    image_grid = torch.tensor([[1, 2 * grid[0], 2 * grid[1]]] * images)
    wanted, _ = model.model.get_rope_index(
        ids, mm_token_type_ids=(ids == model.config.image_token_id).int(), image_grid_thw=image_grid
    )
    assert torch.equal(torch.from_numpy(tokens.position_ids), wanted[:, 0])


@settings(max_examples=60, deadline=None)
@given(text=st.text() | st.lists(st.sampled_from(CONTROL), min_size=1).map(" ".join), images=st.integers(0, 3))
def test_whatever_a_prompt_holds_is_text(tokenizer, text, images):
    """Control tokens of the chat among it: the turn has its own and no other."""
    special = {token: tokenizer.convert_tokens_to_ids(token) for token in CONTROL}
    tokens = PromptTokenizer(tokenizer, "<|image_pad|>", (2, 2))
    found, plain = tokens(text, images).ids.tolist(), tokens("put it down", images).ids.tolist()
    assert {name: found.count(number) for name, number in special.items()} == {
        name: plain.count(number) for name, number in special.items()
    }


def test_white_space_of_any_kind_is_one_space_and_none_at_the_ends(tokenizer):
    tokens = PromptTokenizer(tokenizer, "<|image_pad|>", (2, 2))
    wanted = tokens("put it down", 1).ids
    for text in (" put it down\n", "put\u2028it\u00a0down", "put \t it\x85down \u3000"):
        np.testing.assert_array_equal(tokens(text, 1).ids, wanted)


def _reference_streams(model, observation):
    """Inputs of every decoder layer from Hugging Face's own forward, images one by one through its own tower."""
    inputs = []
    layers = model.model.language_model.layers
    hooks = [
        layer.register_forward_pre_hook(
            lambda _m, args, kw: inputs.append((args or (kw["hidden_states"],))[0]), with_kwargs=True
        )
        for layer in layers
    ]
    hooks.append(model.model.language_model.norm.register_forward_pre_hook(lambda _m, args: inputs.append(args[0])))
    run_hugging_face(model, observation)
    for hook in hooks:
        hook.remove()
    return inputs  # inputs[k] is the stream before layer k, DeepStack's addition included


@pytest.mark.parametrize("hw", [(64, 64), (64, 96)])
def test_features_are_the_inputs_of_the_next_layer_of_hugging_faces_model(hw):
    vlm = VLM("tiny", "frozen", layer_stride=1, reads=VLMReads((0, 1, 3), inputs_embeds=True), vision_only=False).eval()
    observation = make_observation(vlm, prompts=["pick up the can", "go"], hw=hw)
    features = vlm(observation)
    reference = load_model("tiny", torch.float32).eval()
    with torch.no_grad():
        streams = _reference_streams(reference, observation)
    valid = observation.attention_mask
    torch.testing.assert_close(features.inputs_embeds[valid], streams[0][valid], atol=1e-5, rtol=1e-5)
    for feature in (0, 1, 3):
        torch.testing.assert_close(
            features.hidden_states[feature][valid], streams[feature + 1][valid], atol=2e-4, rtol=1e-4
        )


def test_layers_behind_the_last_required_feature_are_not_run(monkeypatch):
    vlm = VLM("tiny", "frozen", layer_stride=1, reads=VLMReads((0, 2)), vision_only=False).eval()
    calls = []
    for index, layer in enumerate(vlm.qwen.model.language_model.layers):
        layer.register_forward_hook(lambda *_args, index=index: calls.append(index))
    vlm(make_observation(vlm, ["go"]))
    assert calls == [0, 1, 2]


def test_positions_give_a_run_of_vision_tokens_one_place():
    is_vision = torch.tensor([[False, False, True, True, True, False, True, True, False]])
    assert position_1d(is_vision).tolist() == [[0, 1, 2, 2, 2, 3, 3, 3, 4]]


def test_token_coordinates_are_the_mean_of_the_pixel_map():
    K = np.array([[200.0, 0, 120], [0, 220.0, 131], [0, 0, 1]], np.float32)
    pixel_map = torch.from_numpy(norm_xy(K[None], (64, 48)))[0]  # (2, H, W)
    mean = torch.nn.functional.avg_pool2d(pixel_map[None], PIXELS)[0].flatten(1).T
    torch.testing.assert_close(token_coordinates(torch.from_numpy(K), 4, 3, PIXELS), mean, atol=1e-5, rtol=1e-5)


def test_modality_follows_masks_and_padding():
    vlm = VLM("tiny", "frozen", 1, VLMReads((0,)), vision_only=False).eval()
    observation = make_observation(vlm, ["a much longer prompt", "go"])
    observation.mask[0, -1, 0, :PIXELS] = False  # the first row of tokens of the first camera
    features = vlm(observation)
    is_vision = observation.input_ids == vlm.encoder.image_token_id
    first_row = is_vision[0].nonzero().flatten()[: 64 // PIXELS]
    assert (features.modality[0, first_row] == Modality.PAD).all()
    assert (features.modality[0] == Modality.VISION).sum() == is_vision[0].sum() - 64 // PIXELS
    padding = ~observation.attention_mask[1]
    assert padding.any() and (features.modality[1, padding] == Modality.PAD).all()
    assert (features.modality[1, ~padding & ~is_vision[1]] == Modality.LANGUAGE).all()


def test_a_camera_with_an_empty_mask_is_not_shown():
    vlm = VLM("tiny", "frozen", 1, VLMReads((0,)), vision_only=False).eval()
    observation = make_observation(vlm, ["go", "go"], hidden=[(1, 0)])
    features = vlm(observation)
    assert set(features.camera[1].tolist()) == {-1, 1}
    assert set(features.camera[0].tolist()) == {-1, 0, 1}
    assert features.camera_mask.tolist() == [[True, True], [False, True]]


def test_a_missing_vlm_is_named_with_what_to_do():
    with pytest.raises(VLMLoadError, match="no-such/model.*Hugging Face Hub"):
        load_config("no-such/model")


def test_a_folder_without_a_model_is_named(tmp_path):
    with pytest.raises(VLMLoadError, match="folder must hold a Qwen3-VL"):
        load_config(str(tmp_path))


def test_a_model_loads_from_a_local_folder(tmp_path):
    from apt.model.encoders.tiny import save_tiny_qwen3vl

    save_tiny_qwen3vl(tmp_path)
    vlm = VLM(str(tmp_path), "frozen", 1, VLMReads((0,)), vision_only=False)
    built_in = VLM("tiny", "frozen", 1, VLMReads((0,)), vision_only=False)
    for name, parameter in vlm.qwen.state_dict().items():
        assert torch.equal(parameter, built_in.qwen.state_dict()[name]), name


def test_training_works_after_serving_in_the_same_process():
    vlm = VLM("tiny", "full", 1, VLMReads((0, 1)), vision_only=False)
    observation = make_observation(vlm, ["go"], hw=(64, 80))
    with torch.inference_mode():
        vlm(observation)
    vlm(observation).hidden_states[1].sum().backward()
    assert vlm.qwen.model.visual.patch_embed.proj.weight.grad.abs().max() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_random_weights_need_the_configuration_alone_and_keep_exact_frequencies(dtype):
    random, loaded = load_model("tiny", dtype, random_weights=True), load_model("tiny", dtype)
    assert all(p.dtype == dtype and p.isfinite().all() for p in random.parameters())
    ours, theirs = dict(random.named_buffers()), dict(loaded.named_buffers())
    assert set(ours) == set(theirs)
    for name, buffer in ours.items():
        assert buffer.dtype == torch.float32 and torch.equal(buffer, theirs[name]), name
