"""Sharded training does what one process would do, and its checkpoints go from one back-end to another."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from apt.checkpoint import load_checkpoint
from apt.configs import TrainConfig
from apt.presets import CONFIGS
from tests.training.helpers import REPOSITORY, flags, losses
from tests.training.joined_batches import run_all
from tests.training.processes import free_port
from train_utils import deepspeed_settings, optimizer_shards
from train_utils.errors import ConfigError
from train_utils.places import LATEST
from train_utils.saving import save_checkpoint

needs_deepspeed = pytest.mark.skipif(
    deepspeed_settings.importlib.util.find_spec("deepspeed") is None,
    reason="deepspeed is not installed; bash scripts/setup.sh --deepspeed",
)
BACKENDS = {
    "ddp": {"backend": "ddp"},
    "zero2": {"backend": "deepspeed", "ds_zero": 2},
    "zero3": {"backend": "deepspeed", "ds_zero": 3},
}
MODES = {
    "frozen": {"vlm_finetune_mode": "frozen", "gradient_accumulation_steps": 2},
    "lora": {"vlm_finetune_mode": "lora", "use_gradient_checkpointing": True},
    "full": {"vlm_finetune_mode": "full", "vlm_lr": 3e-5, "ema_enabled": True, "ema_start": 2},
}
FIRST, LAST = 12, 15  # steps before a resume, and in all
COMMON = {"save_latest_interval": 1000, "save_interval": 1000, "vlm_layer_stride": 3}  # a few blocks: ZeRO takes time


def alone(folder: Path, name: str, **fields) -> None:
    """One process with the joined batch, plain torch."""
    run_all([flags(folder, name, **{"bs": 4, **COMMON, **fields})])


def together(folder: Path, runs: list[tuple[str, dict]]) -> None:
    """Two processes with half of each batch."""
    plan = folder / "runs.json"
    plan.write_text(json.dumps([flags(folder, name, **{"bs": 2, **COMMON, **fields}) for name, fields in runs]))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    result = subprocess.run(
        [*command, "-m", "tests.training.joined_batches", str(plan)],
        cwd=REPOSITORY, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    (folder / "said.txt").write_text(result.stdout)


def checkpoint(folder: Path, name: str) -> dict:
    return load_checkpoint(folder / "ckpt" / name / LATEST)


def agree(one: dict[int, float], other: dict[int, float], steps: range) -> None:
    for step in steps:
        assert one[step] == pytest.approx(other[step], abs=1e-3), step


@needs_deepspeed
def test_zero3_skips_a_non_finite_step_on_all_ranks_and_goes_on_as_one_process_would(tmp_path, located):
    fields = {**MODES["full"], "max_iterations": 4, "vis_interval": 3}
    alone(tmp_path, "poisoned_alone", **fields)
    together(tmp_path, [("poisoned", {**fields, **BACKENDS["zero3"]})])
    ours, theirs = (losses(tmp_path, name) for name in ("poisoned", "poisoned_alone"))
    for step in (1, 3, 4):
        assert ours[step] == pytest.approx(theirs[step], abs=1e-3)
    rows = [json.loads(line) for line in (tmp_path / "log" / "poisoned" / "metrics.jsonl").read_text().splitlines()]
    assert [row["train/skipped_steps"] for row in rows] == [0, 1, 1, 1]

    sharded, whole = (checkpoint(tmp_path, name) for name in ("poisoned", "poisoned_alone"))
    assert set(sharded) - set(whole) == {"optimizer_shards"} and set(whole) - set(sharded) == {"optimizer"}
    for key in ("weights", "vlm_weights"):
        assert {name: (t.shape, t.dtype) for name, t in sharded[key].items()} == {
            name: (t.shape, t.dtype) for name, t in whole[key].items()
        }
        for name, tensor in whole[key].items():
            assert torch.allclose(sharded[key][name], tensor, atol=1e-4), name
    for one, other in zip(sharded["ema"]["shadow_params"], whole["ema"]["shadow_params"], strict=True):
        assert torch.allclose(one, other, atol=1e-4)
    files = {path.name for path in (tmp_path / "ckpt" / "poisoned").glob("*.pt")}
    assert {LATEST, "ckpt_latest_opt_rank0.pt", "ckpt_latest_opt_rank1.pt"} <= files


@needs_deepspeed
@pytest.mark.slow
def test_every_backend_and_mode_agrees_with_one_process_and_resumes_the_others_runs(tmp_path, located):
    for mode, fields in MODES.items():
        alone(tmp_path, f"alone_{mode}", max_iterations=FIRST, **fields)
        fresh = tmp_path / "ckpt" / f"fresh_{mode}"  # a resumed run without the optimizer's state
        shutil.copytree(tmp_path / "ckpt" / f"alone_{mode}", fresh)
        content = dict(load_checkpoint(fresh / LATEST))
        del content["optimizer"]
        save_checkpoint(content, fresh / LATEST)
        for name in ("alone", "fresh"):
            alone(tmp_path, f"{name}_{mode}", max_iterations=LAST, resume=True, **fields)
    for backend, own in BACKENDS.items():
        runs = [(f"{backend}_{mode}", {"max_iterations": FIRST, **fields, **own}) for mode, fields in MODES.items()]
        together(tmp_path, runs)
        for mode in MODES:
            agree(losses(tmp_path, f"{backend}_{mode}"), losses(tmp_path, f"alone_{mode}"), range(1, FIRST + 1))
    for turn, (backend, own) in enumerate(BACKENDS.items()):
        runs = []
        for mode, origin in zip(MODES, [*BACKENDS][turn:] + [*BACKENDS][:turn], strict=True):  # each pair in one mode
            name = f"{origin}_then_{backend}_{mode}"
            shutil.copytree(tmp_path / "ckpt" / f"{origin}_{mode}", tmp_path / "ckpt" / name)
            runs.append((name, {"max_iterations": LAST, "resume": True, **MODES[mode], **own}))
        together(tmp_path, runs)
        said = (tmp_path / "said.txt").read_text()
        assert said.count("warning: the optimizer starts fresh") == len(BACKENDS) - 1
        for name, _ in runs:
            origin, mode = name.split("_then_")[0], name.split("_")[-1]
            expected = losses(tmp_path, f"{'alone' if origin == backend else 'fresh'}_{mode}")
            agree(losses(tmp_path, name), expected, range(FIRST + 1, LAST + 1))


@needs_deepspeed
@pytest.mark.slow
def test_every_architecture_trains_sharded_as_in_one_process(tmp_path, located):
    kinds = {
        "pi": {"arch": "pi", "objective": "flow", **MODES["full"]},
        "gr00t": {"arch": "gr00t", **MODES["lora"]},
        "token_insertion": {"arch": "token_insertion", **MODES["full"]},
    }
    runs = []
    for arch, fields in kinds.items():
        alone(tmp_path, f"alone_{arch}", max_iterations=4, vis_interval=3, **fields)
        for backend, own in BACKENDS.items():
            runs.append((f"{backend}_{arch}", {"max_iterations": 4, "vis_interval": 3, **fields, **own}))
    together(tmp_path, runs)
    for name, fields in runs:
        agree(losses(tmp_path, name), losses(tmp_path, f"alone_{fields['arch']}"), range(1, 5))


def test_a_kill_between_the_files_of_a_save_leaves_shards_that_belong_to_the_checkpoint(tmp_path):
    latest = tmp_path / LATEST

    def restored(identity: str) -> float:
        return float(optimizer_shards.read_shard(latest, 0, identity)["value"])

    optimizer_shards.write_pending(latest, 0, "first", {"value": torch.tensor(1.0)})
    optimizer_shards.finish(latest, 0)
    optimizer_shards.write_pending(latest, 0, "second", {"value": torch.tensor(2.0)})
    saved = list(tmp_path.iterdir())
    # Killed before the checkpoint was replaced: it still says "first".
    assert restored("first") == 1.0 and len(list(tmp_path.iterdir())) == len(saved) - 1
    # Killed after it, before the shards got their names.
    optimizer_shards.write_pending(latest, 0, "second", {"value": torch.tensor(2.0)})
    assert restored("second") == 2.0 and restored("second") == 2.0
    with pytest.raises(ValueError, match="another save"):
        restored("third")
    optimizer_shards.write_pending(latest, 1, "second", {"value": torch.tensor(2.0)})
    optimizer_shards.finish(latest, 1)
    optimizer_shards.remove_beyond(latest, 1)
    assert optimizer_shards.shard_path(latest, 0).exists() and not optimizer_shards.shard_path(latest, 1).exists()
    optimizer_shards.shard_path(latest, 0).write_bytes(b"damaged")
    with pytest.raises(ValueError, match="missing, damaged"):
        restored("second")


@pytest.mark.parametrize(
    "content, named",
    [
        ('{"zero_optimization": {"stage": 2}, "gradient_clipping": 0.5}', "--grad_clip"),
        ('{"zero_optimization": {"stage": 2}, "train_batch_size": 8}', "--bs"),
        ('{"zero_optimization": {"stage": 2}, "bf16": {"enabled": true}}', "--fp16"),
        ('{"zero_optimization": {"stage": 3}}', "ds_zero 2"),
        ("{", "JSON"),
    ],
)
def test_a_settings_file_that_contradicts_the_flags_is_refused(tmp_path, content, named):
    file = tmp_path / "settings.json"
    file.write_text(content)
    with pytest.raises(ConfigError, match=named):
        deepspeed_settings.deepspeed_settings(CONFIGS["debug"], file)


@pytest.mark.parametrize("stage", [2, 3])
def test_settings_take_batches_clipping_and_accumulation_from_the_flags(stage):
    config = TrainConfig(model="tiny", vlm="tiny", vlm_layer_stride=1, ds_zero=stage, bs=3, grad_clip=0.7,
                         gradient_accumulation_steps=5)  # fmt: skip
    settings = deepspeed_settings.deepspeed_settings(config)
    assert settings["zero_optimization"]["stage"] == stage
    assert settings["train_micro_batch_size_per_gpu"] == 3 and settings["gradient_accumulation_steps"] == 5
    assert settings["gradient_clipping"] == 0.7 and settings["torch_autocast"]["enabled"]


def test_a_missing_package_is_one_line(monkeypatch, tmp_path, located, capsys):
    from apt.train import main

    monkeypatch.setattr(deepspeed_settings.importlib.util, "find_spec", lambda name: None)
    assert main(flags(tmp_path, "run", backend="deepspeed")) == 2
    assert "scripts/setup.sh --deepspeed" in capsys.readouterr().err.strip().splitlines()[0]


@needs_deepspeed
@pytest.mark.slow
def test_two_nodes_train_together_and_finetuning_goes_on_under_zero3(tmp_path, data_loc):
    environment = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "APT_DATA_LOC": str(data_loc)}
    common = ["--config", "debug", "--bs", "2", "--max-iter", "3", "--image_size", "64", "--vis_interval", "0"]
    common += ["--sample_multiplex", "3", "--ckpt_dir", str(tmp_path / "ckpt"), "--log_dir", str(tmp_path / "log")]

    def launch(script: str, *arguments: str) -> subprocess.Popen:
        command = ["bash", f"scripts/{script}.sh", *common, *arguments]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(command, cwd=REPOSITORY, env=environment, **pipes)

    meeting = ["--nnodes", "2", "--master-addr", "127.0.0.1", "--master-port", str(free_port()), "--gpus", "cpu"]
    nodes = [
        launch("train", "--stage", "both", "--va-name", "va", "--vla-name", "vla", "--backend", "deepspeed",
               "--ds-zero", "2", *meeting, "--node-rank", str(rank))
        for rank in range(2)
    ]  # fmt: skip
    said = [node.communicate(timeout=300) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said
    assert "2 x cpu" in said[0][0] and "done:" in said[0][0] and "done:" not in said[1][0]
    assert checkpoint(tmp_path, "vla")["optimizer_shards"]["world_size"] == 2

    tuned = launch("finetune", "--pretrained-ckpt", "vla", "--vla-name", "tuned", "--gpus", "cpu,cpu", "--backend",
                   "deepspeed", "--ds-zero", "3", "--vlm-mode", "lora", "--gc", "--accum", "2", "--port",
                   str(free_port()))  # fmt: skip
    out, err = tuned.communicate(timeout=300)
    assert tuned.returncode == 0, err
    assert "iterations 0 to 3" in out and checkpoint(tmp_path, "tuned")["current_iters"] == 3
