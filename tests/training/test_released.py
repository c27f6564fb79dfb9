"""Checkpoints as the authors released them load for inference, for fine-tuning and to be resumed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from apt.checkpoint import load_checkpoint
from apt.checkpoint import main as checkpoint_main
from apt.infer.loading import load_policy
from tests.conftest import GOLDEN
from tests.training.helpers import REPOSITORY, start_training, train
from tests.training.released import deep_vlm, expert_weights, write_release
from tests.training.test_commands import run, where
from train_utils.optimizer_shards import read_shard

LAYOUTS = [("ddp", None), ("deepspeed", None), ("deepspeed", "full"), ("ddp", "full"), ("deepspeed", "lora")]

DEPTHS = [(18, 1, 18), *(pytest.param(*depth, marks=pytest.mark.slow) for depth in ((28, 3, 10), (14, 1, 14)))]


def check(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "scripts/test_ckpt.py", *map(str, arguments)]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("stage", [0, 1])
def test_the_files_of_these_tests_have_the_released_names_and_shapes(stage):
    ours = expert_weights(4, stage, 64, 4, 48, torch.float32)
    with safe_open(GOLDEN / f"action_expert/stage{stage}_weights.safetensors", "pt") as recorded:
        assert {name: list(tensor.shape) for name, tensor in ours.items()} == {
            name: recorded.get_slice(name).get_shape() for name in recorded.keys()
        }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout, kind", LAYOUTS)
def test_a_released_policy_loads_for_inference_tensor_by_tensor(tmp_path, caplog, layout, kind, dtype):
    path = write_release(tmp_path / "apt_vla", layout, vlm_kind=kind, dtype=dtype, ema=True)
    model, config = load_policy(path)
    saved, loaded = load_checkpoint(path), model.released_weights()
    assert set(saved["weights"]) == set(loaded) and config.action_step_embedding is False
    assert all(torch.equal(tensor.float(), loaded[name]) for name, tensor in saved["weights"].items())
    tuned = model.released_vlm_weights()
    assert all(torch.equal(saved["vlm_weights"][name].float(), tensor) for name, tensor in tuned.items())
    assert bool(tuned) == (kind is not None)
    assert "bind_cpu_affinity, some_field_of_another_version, use_prefetcher" in caplog.text


def test_the_average_of_a_released_run_is_found_in_its_module_order(tmp_path):
    for kind in (None, "full", "lora"):
        path = write_release(tmp_path / f"apt_{kind}", "deepspeed", vlm_kind=kind, ema=True)
        averaged, plain = load_policy(path, use_ema=True)[0], load_policy(path)[0]
        for name, tensor in averaged.released_weights().items():
            assert torch.equal(tensor, plain.released_weights()[name] + 1), name
        for name, tensor in averaged.released_vlm_weights().items():
            assert torch.equal(tensor, plain.released_vlm_weights()[name] + 1), name


@pytest.mark.parametrize("layout, kind", LAYOUTS)
def test_a_released_run_is_resumed_with_what_fits_and_a_warning_for_what_does_not(
    tmp_path, located, capsys, layout, kind
):
    write_release(tmp_path / "ckpt/apt_vla", layout, vlm_kind=kind, dtype=torch.bfloat16)
    fields = {"resume": True, "vlm_finetune_mode": kind or "frozen", "max_iterations": 100001}
    assert train(tmp_path, "apt_vla", **fields) == 2
    given = "give --prediction epsilon --action_scale None --action_step_embedding False"
    assert given in capsys.readouterr().err
    fields |= {"prediction": "epsilon", "action_scale": "None", "action_step_embedding": False}
    assert train(tmp_path, "apt_vla", **fields) == 0
    out = capsys.readouterr().out
    assert "resume: apt_vla at iteration 100000" in out and "warning: the optimizer starts fresh" in out
    after = load_checkpoint(tmp_path / "ckpt/apt_vla/ckpt_latest.pt")
    assert after["current_iters"] == 100001 and bool(after.get("vlm_weights")) == (kind is not None)


@pytest.mark.slow
def test_a_released_policy_is_fine_tuned_from_iteration_zero(tmp_path, data_loc):
    write_release(tmp_path / "ckpt/apt_vla", "deepspeed", vlm_kind="lora")
    result = run(
        "finetune", "--config", "debug", "--gpus", "cpu", "--pretrained-ckpt", "apt_vla", "--vla-name", "ft",
        "--max-iter", 2, "--save-interval", 2, "--bs", 2, "--vlm-mode", "lora", *where(tmp_path), data_loc=data_loc,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "copied, 0 fresh, 0 dropped" in result.stdout and "iterations 0 to 2" in result.stdout
    assert load_checkpoint(tmp_path / "ckpt/ft/ckpt_0000002.pt")["current_iters"] == 2


@pytest.mark.parametrize("layers, stride, depth", DEPTHS)
def test_other_depths_are_read_off_the_file(tmp_path, layers, stride, depth):
    vlm = deep_vlm(tmp_path / "vlm", layers)
    path = write_release(
        tmp_path / "apt_vla", "ddp", vlm=str(vlm), depth=depth, dtype=torch.bfloat16, vlm_kind="lora", ema=True,
        stride=stride,
    )  # fmt: skip
    model, _ = load_policy(path)
    assert len(model.expert.blocks) == depth
    result = check("--ckpt", path, "--train-stage", 1)
    assert result.returncode == 0, result.stderr
    for text in (
        f"stage 1, depth {depth} ({depth} blocks), 192 wide (tiny)",
        "bfloat16",
        f"{path.stat().st_size / 2**20:.1f} MiB",
        "LoRA adapters of rank 16",
        "7 updates, decay 0.9995",
        "AdamW",
        "bind_cpu_affinity, some_field_of_another_version, use_prefetcher",
        "fresh      0",
        "dropped    0",
        "weights    objective ddim, prediction epsilon, action_scale None, action_step_embedding False",
    ):
        assert text in result.stdout, (text, result.stdout)


def test_the_report_tells_the_layouts_apart(tmp_path):
    vlm = str(deep_vlm(tmp_path / "vlm", 6))
    prior = write_release(tmp_path / "apt_va", "deepspeed", stage=0, depth=6, vlm=vlm, stride=1)
    result = check("--ckpt", prior, "--train-stage", 1, "--load-from-va")
    assert result.returncode == 0 and "stage 0, depth 6 (3 blocks)" in result.stdout, result.stderr
    assert "optimizer  none" in result.stdout and "EMA        none" in result.stdout


class Malicious:
    """What an attacker hides in a pickle."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("place", ["weights", "ema", "optimizer", "extra"])
def test_code_hidden_in_a_checkpoint_never_runs(tmp_path, located, capsys, place):
    marker = tmp_path / "it_ran"
    path = write_release(tmp_path / "ckpt/evil", "ddp", ema=True)
    content = load_checkpoint(path)
    if place == "extra":
        content["anything"] = Malicious(marker)
    elif place == "ema":
        content["ema"]["shadow_params"][0] = Malicious(marker)
    else:
        content[place]["x"] = Malicious(marker)
    torch.save(content, path.with_name("new.pt"))
    os.replace(path.with_name("new.pt"), path)
    assert train(tmp_path, "evil", resume=True) == 2
    assert train(tmp_path, "other", pretrained_ckpt="evil") == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 2 and all("nothing else is loaded" in line for line in lines)
    with pytest.raises(ValueError, match="nothing else is loaded"):
        load_policy(path)
    if place == "ema":
        result = check("--ckpt", path, "--train-stage", 1)
        assert result.returncode == 2 and "nothing else is loaded" in result.stderr
    assert not marker.exists()


@pytest.mark.parametrize("name", ["ckpt_latest_opt_rank0.pt", ".ckpt_latest_opt_rank0.pt.pending"])
def test_code_hidden_in_an_optimizer_shard_never_runs(tmp_path, name):
    marker, latest = tmp_path / "it_ran", tmp_path / "ckpt_latest.pt"
    torch.save({"identity": "save", "moments": Malicious(marker)}, tmp_path / name)
    with pytest.raises(ValueError, match="holds more than data, which is not loaded"):
        read_shard(latest, 0, "save")
    assert not marker.exists()


@pytest.mark.slow
def test_a_deepspeed_run_with_code_in_its_shard_goes_on_with_a_fresh_optimizer(tmp_path, data_loc):
    pytest.importorskip("deepspeed")
    marker = tmp_path / "it_ran"
    fields = {"backend": "deepspeed", "max_iterations": 1}
    process = start_training(tmp_path, "run", data_loc, **fields)
    assert process.communicate(timeout=120) and process.returncode == 0
    shard = tmp_path / "ckpt/run/ckpt_latest_opt_rank0.pt"
    state = torch.load(shard, weights_only=True)
    torch.save({**state, "moments": Malicious(marker)}, shard)
    process = start_training(tmp_path, "run", data_loc, **{**fields, "max_iterations": 2, "resume": True})
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "warning: the optimizer starts fresh: its optimizer shard" in out and "2/2" in out
    assert not marker.exists()


def test_code_hidden_in_what_is_exported_or_imported_never_runs(tmp_path, capsys):
    marker = tmp_path / "it_ran"
    evil = tmp_path / "evil.pt"
    torch.save({"weights": {"x": Malicious(marker)}}, evil)
    assert checkpoint_main(["export", str(evil), str(tmp_path / "folder")]) == 2
    hub = tmp_path / "hub"
    hub.mkdir()
    (hub / "state.json").write_text("{}")
    (hub / "config.json").write_text("{}")
    torch.save({"x": Malicious(marker)}, hub / "action_expert.safetensors")
    assert checkpoint_main(["import", str(hub), str(tmp_path / "back.pt")]) == 2
    refused, damaged = capsys.readouterr().err.strip().splitlines()
    assert "nothing else is loaded" in refused and "is not a readable safetensors file" in damaged
    assert not marker.exists() and not (tmp_path / "folder").exists() and not (tmp_path / "back.pt").exists()


@pytest.mark.parametrize(
    "field, value, named",
    [
        ("dataset_classes", ["os.system"], "os.system"),
        ("vlm", "__import__('os').system('true')", "__import__"),
        ("model", {"__reduce__": "os.system"}, "model"),
        ("bs", "64; touch it_ran", "bs"),
    ],
)
def test_a_configuration_that_holds_nonsense_is_refused_in_one_line(tmp_path, field, value, named):
    path = write_release(tmp_path / "evil", "ddp")
    config = path.with_name("202501020304.json")
    config.write_text(json.dumps({**json.loads(config.read_text()), field: value}))
    with pytest.raises(ValueError, match=named):
        load_policy(path)
