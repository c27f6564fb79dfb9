"""The VLM's own loss, and what of the expert's learning reaches the VLM."""

from __future__ import annotations

import dataclasses
import json
import shutil

import pytest
import torch

from apt.checkpoint import load_checkpoint
from apt.configs import TrainConfig
from apt.model import language_loss
from apt.model.config import VLAConfig
from apt.model.encoders.hub import load_config, load_model, resolve
from apt.model.vla import VLA
from apt.training import stages
from data_utils.batches.image_text import ImageTextPairs
from data_utils.types import Batch
from tests.data.test_image_text import batches as pair_batches
from tests.data.test_image_text import write_pairs
from tests.model.helpers import make_batch, run_hugging_face_on
from tests.training.helpers import losses, start_training, train
from tests.training.test_deepspeed import BACKENDS, needs_deepspeed
from train_utils.errors import ConfigError

WEIGHT = 0.1
PROMPTS = ["pick up the can and put it on the table", "go"]
FIVE_TARGETS = 4 * 5 * load_config("tiny").text_config.vocab_size  # bytes of their logits
INSULATED = {"knowledge_insulation": True, "lm_loss_weight": WEIGHT}


def policy(mode: str, vlm: str = "tiny", random_vlm: bool = False, **fields) -> VLA:
    """The same weights for every mode and field; adapters that already do something."""
    torch.manual_seed(0)
    config = VLAConfig(model="tiny", vlm=vlm, vlm_layer_stride=1, vlm_mode=mode, num_future=8, **fields)
    model = VLA(config, random_vlm=random_vlm).train()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.02, generator=generator)
            elif name.startswith("expert."):  # nothing is zero-initialised: every gradient is there to compare
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> ImageTextPairs:
    tokenize = policy("frozen").vlm.prompt_tokenizer((64, 64))
    return ImageTextPairs(write_pairs(tmp_path_factory.mktemp("pairs")), (64, 64), tokenize)


def batch_for(model: VLA, pairs: ImageTextPairs | None = None) -> Batch:
    batch = make_batch(model.vlm, PROMPTS)
    return batch if pairs is None else dataclasses.replace(batch, image_text=next(pair_batches(pairs, batch_size=3)))


def loss_of(model: VLA, batch: Batch, **options):
    return model(batch, generator=torch.Generator().manual_seed(2), **options)


def gradients(model: VLA, part: str) -> dict[str, torch.Tensor]:
    """By name, of what trains; fails on a parameter that got none."""
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad and n.startswith(part)}
    assert [name for name, p in trained.items() if p.grad is None] == []
    return {name: p.grad.clone() for name, p in trained.items()}


def hugging_faces_loss(images, input_ids, attention_mask, counts) -> torch.Tensor:
    """Its own forward with labels: those of every row's last ``counts`` tokens, -100 elsewhere."""
    model = load_model("tiny", torch.float32).eval()
    is_target = torch.arange(input_ids.shape[1]) >= input_ids.shape[1] - counts[:, None]
    labels = torch.where(is_target, input_ids, -100)
    return run_hugging_face_on(model, images, input_ids, attention_mask, labels=labels).loss


# -- the loss ----------------------------------------------------------------------------------------------------------


def test_a_prompts_targets_are_all_tokens_behind_its_last_image():
    model = policy("frozen")
    batch = batch_for(model)
    is_image = batch.observation.input_ids == model.vlm.encoder.image_token_id
    behind = is_image.shape[1] - 1 - (is_image * torch.arange(is_image.shape[1])).amax(1)
    assert torch.equal(batch.targets.counts, behind) and batch.targets.longest == int(behind.max())


@pytest.mark.parametrize("chunk_bytes", [language_loss.CHUNK_BYTES, FIVE_TARGETS])
def test_the_loss_is_hugging_faces_own_in_one_chunk_of_logits_or_many(monkeypatch, pairs, chunk_bytes):
    monkeypatch.setattr(language_loss, "CHUNK_BYTES", chunk_bytes)
    model = policy("full", lm_loss_weight=WEIGHT)
    batch = batch_for(model, pairs)
    observation, texts = batch.observation, batch.image_text
    images = observation.rgb[:, -1].flatten(0, 1)[observation.image_index]
    wanted = hugging_faces_loss(images, observation.input_ids, observation.attention_mask, batch.targets.counts)
    answers = hugging_faces_loss(texts.images, texts.input_ids, texts.attention_mask, texts.targets.counts)
    _, prompts_loss, pairs_loss = model.vlm.features_and_language_loss(batch)
    torch.testing.assert_close(prompts_loss.mean, wanted, rtol=1e-5, atol=0)
    torch.testing.assert_close(pairs_loss.mean, answers, rtol=1e-5, atol=0)
    loss = loss_of(model, batch)
    counts = batch.targets.counts.sum(), texts.targets.counts.sum()
    torch.testing.assert_close(loss.lm, (wanted * counts[0] + answers * counts[1]) / sum(counts), rtol=1e-5, atol=0)
    torch.testing.assert_close(loss.lm_pairs, answers, rtol=1e-5, atol=0)


def test_logits_are_made_for_a_chunk_of_targets_at_a_time(monkeypatch):
    monkeypatch.setattr(language_loss, "CHUNK_BYTES", FIVE_TARGETS)
    model = policy("lora", lm_loss_weight=WEIGHT)
    batch, shapes = batch_for(model), []
    model.vlm.qwen.lm_head.register_forward_hook(lambda _m, _args, out: shapes.append(tuple(out.shape)))
    loss_of(model, batch).total.backward()
    suffixes = len(PROMPTS) * batch.targets.longest
    assert len(shapes) == 2 * -(-suffixes // 5) and all(rows <= 5 for rows, _ in shapes), "once again in the backward"


@pytest.mark.parametrize("half", [False, True])
def test_recomputed_activations_and_half_precision_give_nearly_the_same_gradients(pairs, half):
    found = []
    for changed in (False, True):
        model = policy("full", **INSULATED, gradient_checkpointing=changed)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=changed and half):
            loss = loss_of(model, batch_for(model, pairs))
        loss.total.backward()
        found.append((loss.lm, gradients(model, "vlm.")))
    (plain_loss, plain), (loss, ours) = found
    assert loss == pytest.approx(float(plain_loss), rel=0.02 if half else 1e-6)
    for name, gradient in plain.items():
        if half:
            similarity = torch.cosine_similarity(gradient.flatten(), ours[name].flatten(), dim=0)
            assert similarity > 0.9 or gradient.norm() < 1e-3, name
        else:
            torch.testing.assert_close(ours[name], gradient)


# -- what trains on what -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode, arch", [("lora", "apt"), ("full", "apt"), ("full", "pi"), ("full", "gr00t")])
def test_an_insulated_expert_learns_as_beside_a_frozen_vlm_and_the_vlm_from_text_alone(pairs, mode, arch):
    model = policy(mode, arch=arch, **INSULATED)
    batch = batch_for(model, pairs)
    loss = loss_of(model, batch)
    loss.total.backward()
    expert, vlm = gradients(model, "expert."), gradients(model, "vlm.")

    model.zero_grad()
    with torch.no_grad():
        features = model.vlm(batch.observation)
    alone = loss_of(model, batch, features=features)
    alone.total.backward()
    for name, gradient in gradients(model, "expert.").items():
        assert torch.equal(expert[name], gradient), name
    assert loss.total.item() == pytest.approx(alone.total.item() + WEIGHT * loss.lm.item(), rel=1e-6)

    model.zero_grad()
    _, *texts = model.vlm.features_and_language_loss(batch)
    (WEIGHT * (texts[0] + texts[1]).mean).backward()
    for name, gradient in gradients(model, "vlm.").items():
        assert torch.equal(vlm[name], gradient), name
    assert sum(gradient.abs().sum() > 0 for gradient in vlm.values()) == len(vlm)


def test_an_insulated_frozen_vlm_changes_nothing():
    for fields in ({}, {"knowledge_insulation": True}):
        model = policy("frozen", **fields)
        loss = loss_of(model, batch_for(model))
        loss.total.backward()
        found = loss.total.item(), gradients(model, "expert.")
        if not fields:
            plain = found
    assert plain[0] == found[0] and all(torch.equal(gradient, found[1][name]) for name, gradient in plain[1].items())
    assert loss.lm is None and set(loss.metrics()) == {"total", "translation", "rotation", "gripper"}


def test_without_insulation_the_vlm_learns_from_both_losses():
    def of(**fields):
        model = policy("full", **fields)
        loss_of(model, batch_for(model)).total.backward()
        trained = [n for n, p in model.named_parameters() if n.startswith("vlm.") and p.grad is not None]
        return {name: dict(model.named_parameters())[name].grad for name in trained}

    joint, text, actions = of(lm_loss_weight=WEIGHT), of(**INSULATED), of()
    assert set(actions) < set(text) == set(joint)
    for name, gradient in joint.items():
        parts = text[name] + actions[name] if name in actions else text[name]
        torch.testing.assert_close(gradient, parts, atol=1e-4 * float(gradient.abs().max()), rtol=1e-3)


def test_a_head_of_its_own_trains_with_a_fully_tuned_vlm_alone(tmp_path):
    folder = tmp_path / "untied"  # as the 8B is
    shutil.copytree(resolve("tiny"), folder)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["tie_word_embeddings"] = config["tie_word_embeddings"] = False
    (folder / "config.json").write_text(json.dumps(config))
    for mode in ("full", "lora"):
        model = policy(mode, **INSULATED, vlm=str(folder), random_vlm=True)
        loss_of(model, batch_for(model)).total.backward()
        heads = [name for name in gradients(model, "vlm.") if "lm_head" in name]
        assert heads == (["vlm.encoder.model.lm_head.weight"] if mode == "full" else [])


def test_detached_features_are_the_same_numbers_without_history():
    def tensors(value):
        if dataclasses.is_dataclass(value):
            value = vars(value)
        items = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else []
        return [value] if isinstance(value, torch.Tensor) else [tensor for item in items for tensor in tensors(item)]

    for arch in ("apt", "pi"):
        model = policy("full", arch=arch)
        features = model.vlm(batch_for(model).observation)
        with_history, without = tensors(features), tensors(features.detached())
        assert sum(tensor.requires_grad for tensor in with_history) > 2
        assert not any(tensor.requires_grad for tensor in without)
        assert all(torch.equal(*pair) for pair in zip(with_history, without, strict=True))


# -- runs --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"knowledge_insulation": True, "vlm_finetune_mode": "full"}, "nothing to train on; give lm_loss_weight, or"),
        ({"lm_loss_weight": 0.1}, "lm_loss_weight 0.1 needs a VLM that trains: train_stage 1"),
        ({"lm_loss_weight": 0.1, "vlm_finetune_mode": "lora", "train_stage": 0}, "needs a VLM that trains"),
        ({"lm_loss_weight": -1.0, "vlm_finetune_mode": "lora"}, "lm_loss_weight is -1.0; wanted 0"),
        ({"image_text_pairs": "x", "vlm_finetune_mode": "full"}, "image_text_pairs are trained on by"),
        ({"image_text_bs": 0}, "image_text_bs is 0"),
        ({"lm_loss_weight": 0.1, "cache_vlm_features": "x", "vlm_finetune_mode": "lora"}, "not frozen"),
    ],
)
def test_fields_that_contradict_each_other_are_refused_in_one_line(fields, message):
    with pytest.raises(ConfigError, match=message) as error:
        TrainConfig(vlm="tiny", vlm_layer_stride=1, **fields)
    assert "\n" not in str(error.value)


def test_a_run_learns_its_prompts_and_pairs_and_resumes_exactly(tmp_path, located, pairs, capsys):
    common = {
        "vlm_finetune_mode": "full", **INSULATED, "image_text_pairs": pairs.file, "image_text_bs": 2,
        "gradient_accumulation_steps": 2, "camera_view_dropout": 0.5, "max_lr": 1e-3, "num_warmup": 2,
    }  # fmt: skip
    assert train(tmp_path, "whole", max_iterations=6, workers=0, **common) == 0
    assert "image-text pairs: 6 in" in capsys.readouterr().out
    assert train(tmp_path, "parts", max_iterations=3, workers=1, **common) == 0
    assert train(tmp_path, "parts", max_iterations=6, workers=1, resume=True, **common) == 0
    said = capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "log/whole/metrics.jsonl").read_text().splitlines()]
    for tag in ("loss/lm", "loss/lm_pairs"):
        assert rows[-1][tag] < 0.7 * rows[0][tag], tag
    assert f" lm {rows[-1]['loss/lm']:.3f} lm pairs {rows[-1]['loss/lm_pairs']:.3f} lr " in said
    assert losses(tmp_path, "parts") == losses(tmp_path, "whole")
    whole, parts = (load_checkpoint(tmp_path / "ckpt" / name / "ckpt_latest.pt") for name in ("whole", "parts"))
    assert any(name.endswith("language_model.norm.weight") for name in whole["vlm_weights"])
    for key in ("weights", "vlm_weights"):
        for name, tensor in whole[key].items():
            assert torch.equal(tensor, parts[key][name]), name


def test_a_bad_pair_ends_a_run_in_one_line(tmp_path, located, capsys):
    file = write_pairs(tmp_path)
    file.write_text(file.read_text() + "{}\n")
    fields = {"vlm_finetune_mode": "lora", "lm_loss_weight": 0.1, "image_text_pairs": file}
    assert train(tmp_path, "run", **fields) == 2
    assert "pairs.jsonl:7 has no 'image'" in capsys.readouterr().err


@needs_deepspeed
@pytest.mark.slow
def test_two_processes_train_every_parameter_and_sharded_ones_compute_the_same_losses(tmp_path, data_loc, pairs):
    fields = {
        "vlm_finetune_mode": "full", **INSULATED, "image_text_pairs": pairs.file, "image_text_bs": 2,
        "gradient_accumulation_steps": 2, "use_gradient_checkpointing": True, "max_iterations": 3,
    }  # fmt: skip
    found = {}
    for name, backend in BACKENDS.items():
        process = start_training(tmp_path, name, data_loc, processes=2, **fields, **backend)
        _, err = process.communicate(timeout=300)
        assert process.returncode == 0, err[-3000:]
        rows = [json.loads(line) for line in (tmp_path / f"log/{name}/metrics.jsonl").read_text().splitlines()]
        found[name] = [(row["loss/total"], row["loss/lm"], row["loss/lm_pairs"]) for row in rows]
    for name in ("zero2", "zero3"):
        torch.testing.assert_close(torch.tensor(found[name]), torch.tensor(found["ddp"]), rtol=1e-3, atol=1e-3)


def test_what_says_how_the_vlm_trains_is_for_the_second_of_both_stages(tmp_path, located, pairs):
    flags = f"--config debug --gpus cpu --vlm-mode full --lm_loss_weight 0.1 --image_text_pairs {pairs.file}".split()
    argv = [*flags, "--knowledge_insulation", "True", "--ckpt_dir", str(tmp_path), "--log_dir", str(tmp_path)]
    prior, vla = (stage.config for stage in stages.plan("train", argv)[1])
    assert (prior.lm_loss_weight, prior.image_text_pairs) == (0, None)
    assert (vla.lm_loss_weight, vla.image_text_pairs, vla.knowledge_insulation) == (0.1, str(pairs.file), True)
