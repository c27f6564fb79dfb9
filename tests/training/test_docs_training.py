"""docs/training.md does what it says: every command in it is run, at a tiny size, in the document's order."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from apt.checkpoint import CheckpointError, find_checkpoint, load_checkpoint, read_config
from apt.model.encoders.hub import resolve
from apt.model.pretrained import Origin
from apt.presets import CONFIGS
from apt.training import flags, stages
from apt.training.plan import STRATEGIES, estimate_memory
from benchmarks.qwen_sizes import qwen3_vl_2b_folder
from data_utils.samples.dataset import H5DatasetMapBase
from tests.data.test_image_text import write_pairs
from tests.training.helpers import REPOSITORY
from tests.training.processes import free_port
from tests.training.released import write_release
from tests.training.test_holdout import VALUES
from tests.training.test_pictures import SCALARS

DOCS = REPOSITORY / "docs" / "training.md"

# How a command of train.sh or finetune.sh is made small. A flag that is in neither table fails the test.
SMALLER = {
    "--config": lambda value: "debug",  # every preset: the tiny policy, the built-in VLM, synthetic episodes
    "--gpus": lambda value: None,  # given below
    "--bs": lambda value: "2",
    "--max-iter": lambda value: None,  # given below
    "--master-addr": lambda value: "127.0.0.1",
    "--vlm": lambda value: value,  # a folder that the fake download fills with the built-in VLM
    "--ema_start": lambda value: "1",
    "--eval_split": lambda value: "0.4",  # of six episodes
    "--ckpt_dir": lambda value: value.lstrip("/"),  # shared storage: a folder of the test
    "--log_dir": lambda value: value.lstrip("/"),
}
AS_WRITTEN = {
    "--stage", "--va-name", "--vla-name", "--va-conti", "--vla-conti", "--pretrained-ckpt", "--accum", "--vlm-mode",
    "--vlm-lr", "--gc", "--backend", "--ds-zero", "--dry-run", "--nnodes", "--node-rank", "--save-interval",
    "--action_step_embedding", "--augment", "--cache_vlm_features", "--cache_limit_gb", "--noise_samples_per_obs",
    "--ema_enabled", "--one-stage", "--knowledge_insulation", "--lm_loss_weight", "--image_text_pairs",
    "--image_text_bs", "--prediction", "--action_scale",
    "--eval_every", "--eval_samples",
}  # fmt: skip
EVERYWHERE = "--image_size 64 --sample_multiplex 20 --vis_interval 0".split()

# What stands in for programs that are not here: a cluster of two machines, and the Hub.
PROGRAMS = {
    "sbatch": """
        nodes=1
        while [[ $1 == --* ]]; do [ $1 = --nodes ] && nodes=$2; shift 2; done
        SLURM_NNODES=$nodes SLURM_JOB_ID=$SHRUNK_PORT SLURM_JOB_NODELIST=here exec bash "$@" """,
    "scontrol": "echo 127.0.0.1",
    "srun": """
        while [[ $1 == --* ]]; do shift; done
        jobs=()
        for ((node = 0; node < SLURM_NNODES; node++)); do SLURM_NODEID=$node "$@" & jobs+=($!); done
        for job in "${jobs[@]}"; do wait "$job" || exit 1; done""",
    "hf": """
        [ "$1 ${@: -2:1}" = "download --local-dir" ] || exit 2
        cp -r "$SHRUNK_HUB/$(basename "$2")" "${@: -1}" """,
    "tensorboard": 'exec "$PYTHON" -m tensorboard.main --inspect "$@"',  # reads what it would show, and ends
    "python": 'exec "$PYTHON" "$@"',
}


def commands() -> list[list[str]]:
    """The document's commands, split into words."""
    blocks = re.findall(r"```bash\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.S)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def trains(command: list[str]) -> bool:
    return any(word.startswith("scripts/") and "train.s" in word or word == "scripts/finetune.sh" for word in command)


def shrunk(command: list[str], port: int) -> list[str]:
    """A command of train.sh or finetune.sh at a tiny size, whose processes meet at ``port``."""
    script = next(i for i, word in enumerate(command) if word.startswith("scripts/"))
    words, flags = command[: script + 1], command[script + 1 :]
    resumed = False
    for word, value in zip(flags, [*flags[1:], ""], strict=True):
        if not word.startswith("--"):
            continue
        value = "" if value.startswith("--") else value
        assert word in SMALLER or word in AS_WRITTEN, f"this test does not know how to shrink {word} of {command}"
        resumed |= word.endswith("-conti")
        value = SMALLER[word](value) if word in SMALLER else value
        words += [] if value is None else [word, value] if value else [word]
    # Several GPUs stand for two processes where these share out more than the batch; what else they do has other tests.
    words += ["--gpus", "cpu,cpu" if "--backend" in flags else "cpu"]
    if "slurm" not in command[script]:
        words += ["--port", str(port)]
    return [*words, "--max-iter", "4" if resumed else "2", *EVERYWHERE]


def runnable(command: list[str], port: int = 29500) -> list[str]:
    """A command as the test runs it; fails on one that it does not know."""
    if trains(command):
        return shrunk(command, port)
    if command[:3] == ["bash", "scripts/setup.sh", "--deepspeed"]:
        return ["bash", "scripts/setup.sh", "--help"]  # installs nothing here: the tests' environment has DeepSpeed
    if command[:3] == ["python", "-m", "apt.ablate"]:
        return [*command[:3], "--help"]  # tests/ablation runs grids
    known = (
        ["hf", "download"],
        ["tensorboard"],
        ["python", "scripts/test_ckpt.py"],
        ["python", "-m", "apt.checkpoint"],
    )
    assert any(command[: len(start)] == start for start in known), f"this test does not know how to shrink {command}"
    return command


def planned(command: list[str]) -> list[stages.Stage]:
    """What a training command means, as the launcher reads it."""
    script = next(i for i, word in enumerate(command) if word.startswith("scripts/"))
    return stages.plan("finetune" if "finetune" in command[script] else "train", command[script + 1 :])[1]


@pytest.fixture
def place(tmp_path, data_loc, monkeypatch):
    """A checkout to run in, whose outputs are the test's own; the programs above are on its path."""
    folder = tmp_path / "checkout"
    folder.mkdir()
    for entry in REPOSITORY.iterdir():
        if not entry.name.startswith(".") and entry.name not in ("checkpoints", "logs"):
            (folder / entry.name).symlink_to(entry)
    programs = tmp_path / "programs"
    programs.mkdir()
    for name, text in PROGRAMS.items():
        (programs / name).write_text(f"#!/usr/bin/env bash\nset -eu\n{text.strip()}\n")
        (programs / name).chmod(0o755)
    write_pairs(folder / "pairs")
    hub = tmp_path / "hub"
    write_release(hub / "apt_models" / "apt_vla", "ddp")
    shutil.copytree(resolve("tiny"), hub / "Qwen3-VL-8B-Instruct")
    monkeypatch.setenv("PATH", str(programs), prepend=os.pathsep)
    monkeypatch.setenv("APT_DATA_LOC", str(data_loc))
    monkeypatch.setenv("PYTHON", sys.executable)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("SHRUNK_HUB", str(hub))
    monkeypatch.chdir(folder)
    return folder


def test_every_command_is_known_and_stands_in_a_block():
    assert len([runnable(command) for command in commands()]) > 15
    prose = re.sub(r"```.*?```", "", DOCS.read_text(encoding="utf-8"), flags=re.S)
    inline = re.findall(r"`((?:bash|python|sbatch) [^`]*)`", prose)
    # Named in passing, with a test of their own: help, inspection, open loop, the benchmark.
    tested = {"bash scripts/train.sh --help", "python -m data_utils.inspect", "python -m apt.infer.open_loop"}
    assert set(inline) <= tested | {"python benchmarks/train_step.py"}


def test_flags_mean_what_the_document_says_before_they_are_made_smaller(place, monkeypatch):
    monkeypatch.setattr(stages, "check_run_dir", lambda config: None)
    monkeypatch.setattr(H5DatasetMapBase, "locations", classmethod(lambda cls: []))
    monkeypatch.setattr(flags, "check_gpus", lambda gpus, present: None)
    monkeypatch.setattr(stages, "find_checkpoint", lambda name, folder: Path(name))
    monkeypatch.setattr(stages, "load_checkpoint", lambda path: {"weights": {}})

    def read_config(path: Path) -> dict:
        if "released" not in str(path):
            raise CheckpointError("none that says more than the preset")
        return {"model": "base", "vlm": "Qwen/Qwen3-VL-2B-Instruct", "vlm_layer_stride": 3}  # as released ones do

    monkeypatch.setattr(stages, "read_config", read_config)
    monkeypatch.setattr(stages.Origin, "of", lambda content: Origin("apt", 1))
    runs = {}
    for command in filter(trains, commands()):
        for stage in planned(command):
            runs[stage.config.name] = stage.config
    assert all(runs[name].bs * 8 == 256 and runs[name].max_iterations == 100000 for name in ("apt_va", "apt_vla"))
    assert runs["vla"].gradient_accumulation_steps * runs["vla"].bs == 256
    assert runs["apt_va_2x8"].bs * 16 == 256 == runs["apt_va_slurm"].bs * 16
    assert runs["apt_vla_lora"].vlm_finetune_mode == "lora" and runs["apt_vla_lora"].vlm_lr == 5e-5
    for name, has_prior, learns in (
        ("one_stage_ki", False, False), ("one_stage_joint", False, True), ("two_stage_ki", True, False),
        ("two_stage_joint", True, True),
    ):  # fmt: skip
        row = runs[name]
        assert row.load_from_va == has_prior and row.bs * 8 == 256
        assert row.knowledge_insulation != learns and row.vlm_finetune_mode == ("full" if learns else "frozen")
    text = runs["two_stage_text"]
    assert text.knowledge_insulation and text.lm_loss_weight > 0 and text.image_text_pairs is not None
    full = runs["apt_vla_full"]
    assert (full.vlm_finetune_mode, full.backend, full.ds_zero, full.resume) == ("full", "deepspeed", 3, True)
    released, own = runs["ft_released"].vla_config(), runs["ft_pp"].vla_config()
    assert (released.prediction, released.action_scale, released.action_step_embedding) == ("epsilon", None, False)
    assert (own.prediction, own.action_scale, own.action_step_embedding) == ("sample", (0.1, 0.3, 1.0), True)


def test_every_scalar_is_explained():
    text = DOCS.read_text(encoding="utf-8")
    tags = (*SCALARS, *(f"eval/{name}" for name in VALUES), "data/cache_hits", "loss/lm", "loss/lm_pairs")
    assert [tag for tag in tags if f"`{tag}`" not in text] == []


def qwen_folders(folder: Path) -> dict[str, Path]:
    """Qwen3-VL's published sizes, configurations alone."""
    small = qwen3_vl_2b_folder(folder)
    found = {"2B": small}
    shared = {"num_attention_heads": 32, "num_key_value_heads": 8, "num_hidden_layers": 36}
    for name, tied, text, vision in (
        ("4B", True, {"hidden_size": 2560, "intermediate_size": 9728}, {"out_hidden_size": 2560}),
        ("8B", False, {"hidden_size": 4096, "intermediate_size": 12288},
         {"out_hidden_size": 4096, "depth": 27, "hidden_size": 1152, "intermediate_size": 4304,
          "deepstack_visual_indexes": [8, 16, 24]}),
    ):  # fmt: skip
        found[name] = folder / name
        shutil.copytree(small, found[name])
        config = json.loads((small / "config.json").read_text())
        config["text_config"] |= {**shared, **text, "tie_word_embeddings": tied}
        config["vision_config"] |= vision
        config["tie_word_embeddings"] = tied
        (found[name] / "config.json").write_text(json.dumps(config))
    return found


def memory_table(folder: Path) -> str:
    lines = ["| Qwen3-VL | trained | DDP | ZeRO-2 | ZeRO-3 |", "|---|---|---|---|---|"]
    modes = [(0, "frozen", False), (1, "frozen", False), (1, "lora", False), (1, "lora", True), (1, "full", False),
             (1, "full", True)]  # fmt: skip
    for name, vlm in qwen_folders(folder).items():
        for stage, mode, checkpointing in modes:
            config = dataclasses.replace(
                CONFIGS["pretrain"], vlm=str(vlm), bs=32, train_stage=stage, vlm_finetune_mode=mode,
                use_gradient_checkpointing=checkpointing,
            )  # fmt: skip
            sizes = [f"{estimate_memory(config, strategy, 8).total / 2**30:.0f}" for strategy in STRATEGIES]
            label = f"Stage {stage + 1}, {mode}{', `--gc`' if checkpointing else ''}"
            lines.append(f"| {name} | {label} | {' | '.join(sizes)} |")
    return "\n".join(lines)


def test_the_memory_table_is_what_a_dry_run_estimates(tmp_path):
    table = memory_table(tmp_path)
    assert table in DOCS.read_text(encoding="utf-8"), f"the table should be:\n{table}"


def run_together(lines: list[list[str]]) -> list[str]:
    """Run commands side by side; their outputs."""
    environment = {**os.environ, "SHRUNK_PORT": str(free_port())}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    texts = [shlex.join(words) for words in lines]
    processes = [subprocess.Popen(["bash", "-c", text], env=environment, **pipes) for text in texts]
    said = [process.communicate(timeout=300) for process in processes]
    for process, text, (out, err) in zip(processes, texts, said, strict=True):
        assert process.returncode == 0, f"{text}\n{out[-2000:]}\n{err[-3000:]}"
    return [out for out, _ in said]


def check_run(stage: stages.Stage) -> None:
    """The run is there, as long as it was to be, and made as its flags say."""
    config = stage.config
    path = find_checkpoint(config.name, config.ckpt_dir)
    content, saved = load_checkpoint(path), read_config(path)
    assert content["current_iters"] == config.max_iterations
    for field in ("backend", "ds_zero", "train_stage", "vlm_finetune_mode", "gradient_accumulation_steps", "vlm_lr",
                  "knowledge_insulation", "lm_loss_weight", "image_text_pairs"):  # fmt: skip
        assert saved[field] == getattr(config, field), (config.name, field)
    tuned = content.get("vlm_weights", {})
    adapted = {"frozen": False, "lora": True, "full": False}[config.vla_config().vlm_mode]
    assert any("lora_" in name for name in tuned) == adapted and bool(tuned) == (config.vlm_finetune_mode != "frozen")
    assert bool(content["ema"]) == config.ema_enabled
    if config.backend == "deepspeed":
        assert content["optimizer_shards"]["zero_stage"] == config.ds_zero
    if config.cache_vlm_features:
        assert any(Path(config.cache_vlm_features).iterdir())


@pytest.mark.slow
def test_every_command_runs_in_the_documents_order(place):
    pytest.importorskip("deepspeed")
    waiting: list[list[str]] = []
    for command in commands():
        if not waiting:
            port = free_port()
        words = runnable(command, port)
        runs = planned(words) if trains(command) and "slurm" not in " ".join(command) else []
        if "--nnodes" in words:
            waiting.append(words)
            if len(waiting) < int(words[words.index("--nnodes") + 1]):
                continue
        said = run_together(waiting or [words])
        waiting = []
        if "--dry-run" in words:
            assert said[0].count("plan of stage") == len(runs)
            continue
        for stage in runs:
            check_run(stage)
        if "ft_released" in words:
            assert "copied, 0 fresh, 0 dropped" in said[0]
        if command[0] == "tensorboard":
            assert "loss/total" in said[0] and "train/data_wait" in said[0]
        if command[1] == "scripts/setup.sh":
            assert command[2] in said[0]
        if command[:2] == ["python", "scripts/test_ckpt.py"]:
            assert said[0].strip().endswith("fits")
    assert not waiting
    slurm = load_checkpoint(place / "shared/checkpoints/apt_va_slurm/ckpt_latest.pt")
    assert slurm["current_iters"] == 2 and (place / "shared/logs/apt_va_slurm").is_dir()
    ours, copy = (
        load_checkpoint(place / f"checkpoints/APT/{name}/ckpt_latest.pt") for name in ("apt_vla", "apt_vla_copy")
    )
    assert ours["weights"].keys() == copy["weights"].keys()
