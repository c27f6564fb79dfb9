"""The commands users type: what they refuse, in one line and before anything is built; what they run."""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from apt.checkpoint import load_checkpoint
from apt.configs import TrainConfig
from apt.presets import CONFIGS
from apt.train import main as trainer
from apt.training import flags, launch, stages
from apt.training.cli import parse_train_config
from data_utils.cli import CommandLineError
from tests.training.helpers import REPOSITORY, train
from train_utils.saving import save_checkpoint


def run(script: str, *arguments: object, data_loc: Path | None = None) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "2"}
    if data_loc is not None:
        environment["APT_DATA_LOC"] = str(data_loc)
    command = ["bash", f"scripts/{script}.sh", *map(str, arguments)]
    return subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=300)


def refused(result: subprocess.CompletedProcess, *named: str) -> None:
    """One clear line, a non-zero exit, and no training."""
    assert result.returncode != 0
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), result.stderr
    for text in named:
        assert text in lines[0]
    assert "train:" not in result.stdout


@pytest.fixture(scope="module")
def runs(tmp_path_factory, data_loc) -> Path:
    """A folder with a trained VA prior ``va`` and a VLA ``vla``."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("APT_DATA_LOC", str(data_loc))
        assert train(folder, "va", train_stage=0, max_iterations=1) == 0
        assert train(folder, "vla", max_iterations=1, pretrained_ckpt="va", load_from_va=True) == 0
    return folder


def where(folder: Path) -> tuple:
    return ("--ckpt_dir", folder / "ckpt", "--log_dir", folder / "log", "--image_size", 64, "--vis_interval", 0)


def test_one_command_trains_both_stages(tmp_path, data_loc):
    result = run(
        "train", "--config", "debug", "--gpus", "cpu", "--va-name", "a", "--vla-name", "b", "--max-iter", 2,
        "--bs", 2, "--vlm-mode", "full", *where(tmp_path), data_loc=data_loc,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "start: a: 71 tensors copied, 30 fresh" in result.stdout
    vla = load_checkpoint(tmp_path / "ckpt" / "b" / "ckpt_latest.pt")
    assert vla["current_iters"] == 2 and vla["vlm_weights"]
    assert "vlm_weights" not in load_checkpoint(tmp_path / "ckpt" / "a" / "ckpt_latest.pt")
    assert list((tmp_path / "log" / "b").glob("events*"))


def test_a_failing_stage_0_never_starts_stage_1(tmp_path, data_loc, episode_dir):
    broken = tmp_path / "episodes"
    shutil.copytree(episode_dir, broken)
    victim = sorted(broken.glob("*.h5"))[0]
    victim.write_bytes(victim.read_bytes()[: victim.stat().st_size // 2])
    location = tmp_path / "loc.yaml"
    location.write_text(f"default:\n  PickPlaceCan: {broken}\n")
    result = run("train", "--config", "debug", "--gpus", "cpu", *where(tmp_path), data_loc=location)
    assert result.returncode != 0
    assert victim.name in result.stderr.splitlines()[0] and "Traceback" not in result.stderr
    assert "stage 1" not in result.stdout and "train:" not in result.stdout
    assert not list((tmp_path / "ckpt").rglob("*.pt"))


@pytest.mark.parametrize(
    "arguments, named",
    [
        (("--config", "debug", "--lerning_rate", 1), ("--lerning_rate",)),
        (("--config", "debug", "--max_lrr", 1), ("--max_lrr", "--max_lr")),
        (("--config", "debug", "--max_lr", "fast"), ("max-lr", "fast")),
        (("--config", "debug", "--bs", "many"), ("--bs", "many")),
        (("--config", "debug", "--stage", 3), ("--stage",)),
        (("--confg", "debug"), ("--confg", "did you mean --config?")),
        (("--stage", 0), ("--config is missing",)),
        (("--config", "deebug"), ("deebug", "debug", "pretrain")),
        (("--config", "debug", "--model", "huge"), ("huge", "base")),
        (("--config", "debug", "--dataset_classes", "Nope"), ("Nope", "PickPlaceCan")),
        (("--config", "debug", "--backend", "fsdp"), ("--backend", "fsdp", "deepspeed")),
        (("--config", "debug", "--ds-zero", 1), ("--ds-zero",)),
        (("--config", "debug", "--nnodes", 2, "--node-rank", 2), ("--node-rank", "nnodes - 1")),
        (("--config", "pretrain",), ("Droid", "data_loc")),
        (("--config", "debug", "--stage", 1, "--va-name", "nothing"), ("nothing",)),
        (("--config", "debug", "--stage", 1, "--vla-conti", "nothing"), ("nothing",)),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_before_anything_is_built(tmp_path, located, capfd, arguments, named):
    command = ["train", *map(str, arguments), "--gpus", "cpu", *map(str, where(tmp_path))]
    code = launch.main(command)  # what the script calls, without the seconds a process takes to import torch
    refused(subprocess.CompletedProcess(command, code, *capfd.readouterr()), *named)
    assert not (tmp_path / "ckpt").exists()


def test_the_script_reports_a_mistake_as_its_program_does(tmp_path, data_loc):
    result = run("train", "--config", "deebug", "--gpus", "cpu", *where(tmp_path), data_loc=data_loc)
    refused(result, "deebug", "debug", "pretrain")
    assert result.returncode == 2


def test_a_name_in_use_is_not_overwritten(runs, data_loc):
    before = (runs / "ckpt" / "va" / "ckpt_latest.pt").read_bytes()
    result = run("train", "--config", "debug", "--gpus", "cpu", "--va-name", "va", *where(runs), data_loc=data_loc)
    refused(result, "va", "--va-conti")
    assert (runs / "ckpt" / "va" / "ckpt_latest.pt").read_bytes() == before


@pytest.mark.parametrize("arguments, named", [
    (("--stage", 1, "--vla-conti", "va"), ("va/ckpt_latest.pt is a stage-0 run's", "use --stage 0 --va-conti va")),
    (("--stage", 0, "--va-conti", "vla"), ("vla/ckpt_latest.pt is a stage-1 run's", "use --stage 1 --vla-conti vla")),
    (("--stage", 0, "--va-conti", "long", "--max-iter", 15), ("run long is at iteration 20 already", "is 15; raise")),
])  # fmt: skip
def test_a_run_that_cannot_be_resumed_so_is_left_alone(runs, located, capfd, arguments, named):
    if "long" in arguments:
        (runs / "ckpt" / "long").mkdir()
        content = load_checkpoint(runs / "ckpt" / "va" / "ckpt_latest.pt")
        save_checkpoint({**content, "current_iters": 20}, runs / "ckpt" / "long" / "ckpt_latest.pt")
    command = ["train", "--config", "debug", "--gpus", "cpu", *map(str, (*arguments, *where(runs)))]
    code = launch.main(command)
    assert code == 2
    refused(subprocess.CompletedProcess(command, code, *capfd.readouterr()), *named)


@pytest.mark.parametrize(
    "start",
    [
        ("finetune", "--config", "own_robot", "--pretrained-ckpt", "vla"),
        ("train", "--config", "finetune_pp", "--stage", "1", "--va-name", "va"),
        ("train", "--config", "finetune_pp", "--stage", "1", "--vla-conti", "vla"),
    ],
    ids=("from a policy", "from a prior", "resumed"),
)
def test_a_run_from_a_checkpoint_has_its_policys_size_and_vlm_and_says_so(start, runs, located, capsys):
    assert launch.main([*start, "--gpus", "cpu", *map(str, where(runs)), "--dry-run"]) == 0
    note, *rest = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"\[stage 1\] as in \S+/ckpt_latest.pt: model tiny \(\w+: base\), vlm tiny \(.*", note)
    assert "vlm_layer_stride 1 (" in note and "action_scale" not in note, "what is alike is not told"
    assert any("2.37M parameters trained" in line for line in rest)


def test_flags_come_before_what_a_checkpoint_says(runs, located, capsys):
    flags = ["--vla-name", "refused", "--objective", "flow", "--model", "small"]
    finetune = ["finetune", "--config", "own_robot", "--pretrained-ckpt", "vla", "--gpus", "cpu"]
    assert launch.main([*finetune, *map(str, where(runs)), *flags, "--dry-run"]) == 0
    note = capsys.readouterr().out.splitlines()[0]
    assert "vlm tiny" in note and "model" not in note and "prediction" not in note


def test_a_checkpoint_of_the_wrong_stage_or_size_is_refused(runs, located, capsys):
    assert train(runs, "wrong", max_iterations=1, pretrained_ckpt="va") == 2
    assert "stage-0 checkpoint" in capsys.readouterr().err
    assert train(runs, "wrong", max_iterations=1, pretrained_ckpt="vla", model="small") == 2
    error = capsys.readouterr().err
    assert error.endswith("is of a policy with model tiny, this run's has model small; give --model tiny\n")
    assert not (runs / "ckpt" / "wrong").exists()


def test_a_checkpoint_that_is_damaged_or_holds_code_is_refused(tmp_path, runs, located, capsys):
    damaged = tmp_path / "damaged.pt"
    damaged.write_bytes((runs / "ckpt" / "va" / "ckpt_latest.pt").read_bytes()[:5000])
    evil = tmp_path / "evil.pt"
    torch.save({"weights": {}, "run": subprocess.Popen}, evil)
    for path in (damaged, evil):
        assert train(tmp_path, "wrong", max_iterations=1, pretrained_ckpt=path) == 2
        assert path.name in capsys.readouterr().err


def test_finetuning_starts_from_either_stage_at_iteration_zero(runs, data_loc, tmp_path):
    for upstream, copied in (("vla", "101 tensors copied, 0 fresh"), ("va", "71 tensors copied, 30 fresh")):
        result = run(
            "finetune", "--config", "debug", "--gpus", "cpu", "--pretrained-ckpt",
            runs / "ckpt" / upstream / "ckpt_latest.pt", "--vla-name", f"ft_{upstream}", "--max-iter", 1, "--bs", 2,
            *where(tmp_path), data_loc=data_loc,
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
        assert copied in result.stdout and "iterations 0 to 1" in result.stdout


def test_a_tuned_vlm_survives_a_later_stage_that_freezes_it(tmp_path, located):
    assert train(tmp_path, "full", max_iterations=1, vlm_finetune_mode="full") == 0
    assert train(tmp_path, "frozen", max_iterations=1, pretrained_ckpt="full") == 0
    full, frozen = (
        load_checkpoint(tmp_path / "ckpt" / n / "ckpt_latest.pt")["vlm_weights"] for n in ("full", "frozen")
    )
    assert set(full) == set(frozen) and all(torch.equal(full[name], frozen[name]) for name in full)
    assert all(name.startswith("vlm._qwen.") for name in full)


def test_lora_checkpoints_hold_adapters_alone_and_need_a_lora_model(tmp_path, located, capsys):
    assert train(tmp_path, "lora", max_iterations=1, vlm_finetune_mode="lora") == 0
    names = list(load_checkpoint(tmp_path / "ckpt" / "lora" / "ckpt_latest.pt")["vlm_weights"])
    assert names and all(name.startswith("vlm._qwen.") and ".default.weight" in name for name in names)
    assert train(tmp_path, "frozen", max_iterations=1, pretrained_ckpt="lora") == 2
    assert "LoRA adapters need --vlm-mode lora" in capsys.readouterr().err


def test_the_offline_check_says_what_a_load_would_do(runs, tmp_path):
    def check(*arguments) -> subprocess.CompletedProcess:
        command = [sys.executable, "scripts/test_ckpt.py", *map(str, arguments)]
        return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120)

    va = runs / "ckpt" / "va" / "ckpt_latest.pt"
    good = check("--ckpt", va, "--train-stage", 1, "--load-from-va")
    assert good.returncode == 0 and "copied     71" in good.stdout and "fresh      30" in good.stdout
    wrong = check("--ckpt", va, "--train-stage", 1)
    assert wrong.returncode == 2 and "--load-from-va" in wrong.stderr
    assert check("--ckpt", tmp_path / "none.pt", "--train-stage", 0).returncode == 2
    other = tmp_path / "other.pt"
    save_checkpoint({"weights": {"layer.weight": torch.zeros(2)}}, other)
    strange = check("--ckpt", other, "--train-stage", 0)
    assert strange.returncode == 2 and len(strange.stderr.strip().splitlines()) == 1


def test_every_preset_of_the_specification_is_there():
    wanted = {
        "debug", "pretrain", "finetune_pp", "finetune_libero", "finetune_libero_spatial", "finetune_libero_object",
        "finetune_libero_goal", "finetune_libero_10", "finetune_aloha_pp", "finetune_aloha_pp_storage",
        "finetune_aloha_pp_clutter",
    }  # fmt: skip
    assert wanted <= set(CONFIGS)
    pretrain = CONFIGS["pretrain"]
    assert dict(zip(pretrain.dataset_classes, pretrain.dataset_weights, strict=True)) == {
        "Droid": 10, "AgibotWorldAlpha": 10, "InternA1Franka": 2, "InternA1Lift2": 2, "InternA1Genie1": 2,
        "InternA1SplitAloha": 2, "InternM1Franka": 2,
    }  # fmt: skip
    libero = CONFIGS["finetune_libero"]
    assert (libero.sample_multiplex, libero.num_warmup, libero.max_iterations) == (1000, 2000, 70000)
    for config in CONFIGS.values():
        assert config.action_step_embedding and config.prediction == "sample"
        assert config.action_scale == (0.1, 0.3, 1.0)


def test_predictions_and_scales_are_flags_and_wrong_ones_one_line():
    argv = "--config finetune_pp --prediction v_prediction --action_scale 0.2 0.5 1".split()
    config = parse_train_config(argv)
    assert (config.prediction, config.action_scale) == ("v_prediction", (0.2, 0.5, 1.0))
    released = parse_train_config("--config finetune_pp --prediction epsilon --action_scale None".split()).vla_config()
    assert (released.prediction, released.action_scale) == ("epsilon", None)
    for given, named in (
        ("--objective flow --prediction epsilon", "prediction 'epsilon' is not one of the objective 'flow'; choose"),
        ("--action_scale 1", "action_scale is 1.0; wanted 3 positive numbers"),
        ("--action_scale 0.1 -0.3 1", "action_scale is 0.1 -0.3 1.0; wanted 3 positive numbers"),
    ):
        with pytest.raises(ValueError, match=named):
            parse_train_config(["--config", "debug", *given.split()])


@pytest.mark.parametrize("script", ["train", "finetune"])
def test_help_lists_every_flag_preset_and_default(script, capsys):
    with pytest.raises(SystemExit) as ended:
        launch.main([script, "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert ended.value.code == 0 and f"usage: scripts/{script}.sh" in said
    assert all(name in said for name in CONFIGS) and "docs/training.md" in said
    parser = flags.build_parser(script)
    for action in parser._actions:
        assert action.help, f"{action.option_strings} has no help"
        assert all(option in said for option in action.option_strings)
    assert ("--pretrained-ckpt" in said) == (script == "finetune")
    assert f"default: {'1' if script == 'finetune' else 'both'}" in said and "(default: 60)" in said


def test_the_trainers_help_lists_every_field_and_the_dry_run(capsys):
    with pytest.raises(SystemExit):
        trainer(["--help"])
    said = capsys.readouterr().out
    assert "--dry-run says what the run would take" in " ".join(re.sub("[│─╭╮╰╯]", " ", said).split())
    assert all(f"--{field.name.replace('_', '-')}" in said for field in dataclasses.fields(TrainConfig))


@pytest.mark.parametrize("given, named", [
    (("--dryrun",), "--dryrun"),
    (("--node-timeout", 0), "--node-timeout is 0"),
    (("--node-timeout", "soon"), "--node-timeout"),
    (("--accum", 0), "gradient_accumulation_steps is 0"),
    (("--max-iter", 0), "max_iterations is 0"),
    (("--name", "mine"), "--name is set for each stage by --va-name and --vla-name"),
    (("--vlm-mode", "some"), "--vlm-mode"),
    (("--cache_vlm_features", "features"), "cache_vlm_features needs images that come again"),
    (("--backend", "deepspeed", "--use_compile", True, "--ds-zero", 3), "use_compile does not work with ds_zero 3"),
])  # fmt: skip
def test_flags_that_cannot_be_meant_are_one_line(tmp_path, located, capfd, given, named):
    command = ["train", "--config", "debug", "--gpus", "cpu", *map(str, given), *map(str, where(tmp_path))]
    refused(subprocess.CompletedProcess(command, launch.main(command), *capfd.readouterr()), named)
    assert not (tmp_path / "ckpt").exists()


def test_gpus_that_are_not_there_are_refused(tmp_path, data_loc):
    if torch.cuda.is_available():
        missing = str(torch.cuda.device_count())
    else:
        missing = "0"
    for gpus, named in ((missing, "torch sees"), ("abc", "wanted indices")):
        refused(run("train", "--config", "debug", "--gpus", gpus, *where(tmp_path), data_loc=data_loc), "--gpus", named)


def test_finetuning_needs_something_to_start_from(tmp_path, data_loc):
    result = run("finetune", "--config", "debug", "--gpus", "cpu", *where(tmp_path), data_loc=data_loc)
    refused(result, "--pretrained-ckpt is missing")


def test_one_stage_needs_no_prior_and_refuses_one(tmp_path, located):
    own = [*map(str, where(tmp_path)), "--config", "debug", "--gpus", "cpu", "--vla-name", "b"]
    _, (stage,) = stages.plan("train", [*own, "--stage", "1", "--one-stage"])
    assert stage.config.train_stage == 1 and stage.config.pretrained_ckpt is None and not stage.config.load_from_va
    for given in ([], ["--stage", "1", "--va-name", "a"], ["--stage", "1", "--pretrained_ckpt", "a"]):
        with pytest.raises(CommandLineError, match="--one-stage"):
            stages.plan("train", [*own, "--one-stage", *given])


def test_too_few_episodes_for_a_batch_is_one_line(tmp_path, located, capsys):
    assert train(tmp_path, "run", bs=64, sample_multiplex=1) == 2
    assert "raise sample_multiplex or lower the batch size" in capsys.readouterr().err


def test_a_vla_is_not_fine_tuned_as_a_prior(runs, tmp_path, data_loc):
    result = run(
        "finetune", "--config", "debug", "--gpus", "cpu", "--stage", "both", "--pretrained-ckpt",
        runs / "ckpt" / "vla" / "ckpt_latest.pt", *where(tmp_path), data_loc=data_loc,
    )  # fmt: skip
    refused(result, "is a VLA already", "--stage 1")
