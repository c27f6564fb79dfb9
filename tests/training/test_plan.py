"""What a dry run says is what a run takes."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys

import pytest
import torch

from apt.configs import CONFIGS
from apt.vla import VLA
from tests.model.helpers import make_batch
from tests.training.helpers import REPOSITORY, flags, train
from tests.training.test_commands import run, where
from train_utils.plan import activation_bytes, checkpoint_bytes, count_parameters, estimate_memory


def config(stage: int, mode: str, **changes):
    return dataclasses.replace(CONFIGS["debug"], train_stage=stage, vlm_finetune_mode=mode, device="cpu", **changes)


@pytest.mark.parametrize("stage, mode", [(0, "frozen"), (1, "frozen"), (1, "lora"), (1, "full")])
def test_parameters_are_counted_as_in_the_model_itself(stage, mode):
    planned = config(stage, mode)
    model = VLA(planned.vla_config())
    for part, count in zip((model.expert, model.vlm), count_parameters(planned), strict=True):
        assert count.trained == sum(p.numel() for p in part.parameters() if p.requires_grad)
        assert count.frozen == sum(p.numel() for p in part.parameters() if not p.requires_grad)
        assert count.trained_bytes == 4 * count.trained


@pytest.mark.parametrize("stage, mode", [(0, "frozen"), (1, "frozen"), (1, "lora"), (1, "full")])
def test_the_activation_model_is_near_what_autograd_keeps(stage, mode):
    planned = config(stage, mode, image_size=64, bs=4)
    model = VLA(planned.vla_config()).train()
    text = "put the can in the dark bin, then the milk"[: 48 - 14]
    batch = make_batch(model.vlm, [text] * 4, num_future=planned.vla_config().num_future)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(batch)
    assert loss.total.requires_grad
    assert 0.6 < activation_bytes(planned) / sum(kept.values()) < 1.6


@pytest.mark.parametrize("mode, ema", [("frozen", False), ("lora", True), ("full", True)])
def test_the_size_of_a_checkpoint_is_that_of_the_file(tmp_path, located, mode, ema):
    fields = {"vlm_finetune_mode": mode, "ema_enabled": ema, "ema_start": 0}
    assert train(tmp_path, "run", max_iterations=1, **fields) == 0
    planned = checkpoint_bytes(config(1, mode, ema_enabled=ema, image_size=64))
    written = (tmp_path / "ckpt/run/ckpt_latest.pt").stat().st_size
    assert planned == pytest.approx(written, rel=0.04)


def test_zero_divides_what_it_shards():
    planned = config(1, "full")
    ddp, two, three = (estimate_memory(planned, strategy, 4) for strategy in ("DDP", "ZeRO-2", "ZeRO-3"))
    assert two.gradients == three.gradients == ddp.gradients / 4
    assert two.optimizer == three.optimizer == ddp.optimizer / 4
    assert three.weights < ddp.weights < two.weights
    assert ddp.activations == two.activations == three.activations
    assert activation_bytes(dataclasses.replace(planned, use_gradient_checkpointing=True)) < ddp.activations


def test_a_dry_run_of_both_stages_prints_the_plan_and_writes_nothing(tmp_path, data_loc):
    arguments = ("--config", "debug", "--gpus", "0,1,2,3,4,5,6,7", "--accum", 2, "--vlm-mode", "lora", "--dry-run")
    result = run("train", *arguments, *where(tmp_path), data_loc=data_loc)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("plan of stage") == 2 and "train:" not in result.stdout
    assert "6 episodes, 144 frames of PickPlaceCan" in result.stdout
    assert "20 of 64 samples (8 processes x 4 x 2): 213.33 epochs of 6 samples" in result.stdout
    assert re.search(r"->\s+lora DDP", result.stdout) and "free in" in result.stdout
    assert not list(tmp_path.iterdir())


def test_the_trainer_itself_plans_too(tmp_path, located):
    command = [sys.executable, "-m", "apt.train", *flags(tmp_path, "run", train_stage=0), "--dry-run"]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0 and result.stdout.count("plan of stage 0") == 1, result.stderr
    assert not list(tmp_path.iterdir())
