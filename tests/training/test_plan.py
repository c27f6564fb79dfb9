"""What a dry run says is what a run takes."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest
import torch

from apt.checkpoint import load_checkpoint
from apt.model.vla import VLA
from apt.presets import CONFIGS
from apt.training.plan import activation_bytes, checkpoint_bytes, count_parameters, describe_plan, estimate_memory
from data_utils.errors import DataError
from tests.model.helpers import make_batch
from tests.training.helpers import REPOSITORY, flags, train
from tests.training.test_commands import run, where


def config(stage: int, mode: str, **changes):
    return dataclasses.replace(CONFIGS["debug"], train_stage=stage, vlm_finetune_mode=mode, device="cpu", **changes)


@pytest.mark.parametrize(
    "stage, mode, weight", [(0, "frozen", 0), (1, "frozen", 0), (1, "lora", 0), (1, "full", 0), (1, "full", 0.1)]
)
def test_parameters_are_counted_as_in_the_model_itself(stage, mode, weight):
    planned = config(stage, mode, lm_loss_weight=float(weight))
    model = VLA(planned.vla_config())
    for part, count in zip((model.expert, model.vlm), count_parameters(planned), strict=True):
        assert count.trained == sum(p.numel() for p in part.parameters() if p.requires_grad)
        assert count.frozen == sum(p.numel() for p in part.parameters() if not p.requires_grad)
        assert count.trained_bytes == 4 * count.trained


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize(
    "arch, stage, mode, weight",
    [("apt", 0, "frozen", 0), ("apt", 1, "frozen", 0), ("apt", 1, "lora", 0), ("apt", 1, "lora", 0.1)]
    + [("apt", 1, "full", 0), ("pi", 1, "frozen", 0), ("pi", 1, "full", 0), ("gr00t", 1, "frozen", 0)]
    + [("gr00t", 1, "full", 0), ("token_insertion", 1, "full", 0)],
)
def test_the_activation_model_is_near_what_autograd_keeps(arch, stage, mode, weight, half):
    planned = config(stage, mode, arch=arch, image_size=64, bs=4, fp16=half, lm_loss_weight=float(weight))
    model = VLA(planned.vla_config(), frozen_dtype=torch.bfloat16 if half else torch.float32).train()
    text = "put the can in the dark bin, then the milk"[: 48 - 14]
    batch = make_batch(model.vlm, [text] * 4, num_future=planned.vla_config().num_future)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    autocast = torch.autocast("cpu", dtype=torch.bfloat16, enabled=half)
    with autocast, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(batch)
    assert loss.total.requires_grad
    assert 0.65 < activation_bytes(planned) / sum(kept.values()) < 1.5


@pytest.mark.parametrize("mode, ema", [("frozen", False), ("lora", True), ("full", True)])
def test_the_size_of_a_checkpoint_is_that_of_the_file(tmp_path, located, mode, ema):
    fields = {"vlm_finetune_mode": mode, "ema_enabled": ema, "ema_start": 0}
    assert train(tmp_path, "run", max_iterations=1, **fields) == 0
    planned = checkpoint_bytes(config(1, mode, ema_enabled=ema, image_size=64))
    written = (tmp_path / "ckpt/run/ckpt_latest.pt").stat().st_size
    assert planned == pytest.approx(written, rel=0.04)


def test_a_plan_with_cached_features_says_how_much_disk_they_may_take(tmp_path, located):
    folder = tmp_path / "features"
    planned = config(
        0, "frozen", augment=False, cache_vlm_features=str(folder), cache_limit_gb=7, ckpt_dir=str(tmp_path)
    )
    assert f"features: 7 GB at most in {folder}" in describe_plan(planned, 1)
    assert not folder.exists()


def test_zero_divides_what_it_shards():
    planned = config(1, "full")
    ddp, two, three = (estimate_memory(planned, strategy, 4) for strategy in ("DDP", "ZeRO-2", "ZeRO-3"))
    assert two.gradients == three.gradients == ddp.gradients / 4
    assert two.optimizer == three.optimizer == ddp.optimizer / 4
    assert three.weights < ddp.weights < two.weights
    assert ddp.activations == two.activations == three.activations
    assert activation_bytes(dataclasses.replace(planned, use_gradient_checkpointing=True)) < ddp.activations


def test_a_dry_run_of_both_stages_prints_the_plan_and_writes_nothing(tmp_path, data_loc):
    arguments = (
        "--config",
        "debug",
        "--gpus",
        "0,1,2,3,4,5,6,7",
        "--accum",
        2,
        "--vlm-mode",
        "lora",
        "--gc",
        "--dry-run",
    )
    result = run("train", *arguments, "--sample_multiplex", 7, *where(tmp_path), data_loc=data_loc)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("plan of stage") == 2 and "train:" not in result.stdout
    assert "6 episodes, 144 frames of PickPlaceCan" in result.stdout
    # 42 visits are 5 per process, which fill one batch of 4; two of these make a step.
    assert "20 of 64 samples (8 processes x 4 x 2): 40.00 epochs of 32 samples" in result.stdout
    prior, vla = result.stdout.split("plan of stage 1")
    assert prior.count("frozen  ") == 3 and "lora  " not in prior
    (marked,) = [line.split() for line in vla.splitlines() if "->" in line]
    assert marked[:4] == ["->", "lora", "--gc", "DDP"]
    titles = next(line.split() for line in vla.splitlines() if "gradients" in line)
    assert titles == ["weights", "gradients", "optimizer", "ema", "activations", "total"]
    sizes = [float(size) for size in marked[4::2]]
    assert len(sizes) == 6 and sum(sizes[:5]) == pytest.approx(sizes[5], abs=0.4)
    assert not list(tmp_path.iterdir())


def test_epochs_are_counted_as_the_trainer_goes_through_them(tmp_path, located):
    fields = {"bs": 4, "sample_multiplex": 3, "gradient_accumulation_steps": 2, "max_iterations": 5}
    assert train(tmp_path, "run", **fields) == 0  # 18 visits per epoch, 4 batches, 2 steps
    content = load_checkpoint(tmp_path / "ckpt/run/ckpt_latest.pt")
    said = describe_plan(config(1, "frozen", image_size=64, ckpt_dir=str(tmp_path), **fields), 1)
    assert "5 of 8 samples (1 processes x 4 x 2): 2.50 epochs of 16 samples" in said
    assert (content["last_ep"], content["epoch_samples"]) == (2, 8), "two epochs and a half"


def test_a_plan_whose_data_fill_no_batch_is_refused_as_the_run_would_be(tmp_path, located):
    with pytest.raises(DataError, match="0 samples per rank, less than one batch of 4; raise sample_multiplex"):
        describe_plan(config(1, "frozen", ckpt_dir=str(tmp_path)), processes=8)


def test_the_trainer_itself_plans_too(tmp_path, located):
    command = [sys.executable, "-m", "apt.train", *flags(tmp_path, "run", train_stage=0), "--dry-run"]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0 and result.stdout.count("plan of stage 0") == 1, result.stderr
    assert not list(tmp_path.iterdir())
