"""Which stages a command line means, every name, path and field checked before anything is built."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import functools
from pathlib import Path

from apt.checkpoint import CheckpointError, find_checkpoint, load_checkpoint, read_config
from apt.configs import TrainConfig
from apt.model.pretrained import Origin
from apt.presets import get_config
from apt.training.cli import CommandLineError, parse_train_config
from apt.training.flags import build_parser, check_flags
from apt.training.inheritance import as_flags, inherited
from apt.training.run_dir import check_run_dir
from data_utils.batches.image_text import scan_pairs
from data_utils.datasets import get_dataset_class
from train_utils.deepspeed_settings import check_deepspeed, deepspeed_settings
from train_utils.places import LATEST

# Fields on how the VLM trains, which stage 0 keeps frozen: given for both stages, they are meant for stage 1.
_TRAINING_THE_VLM = {"lm_loss_weight": "0", "image_text_pairs": "None"}

# Fields that differ between the stages of one command: what says so instead.
_OF_THE_LAUNCHER = {
    "name": "--va-name and --vla-name",
    "train_stage": "--stage",
    "resume": "--va-conti and --vla-conti",
}


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage as it will be run."""

    config: TrainConfig
    argv: list[str]  # of apt.train
    taken_over: list[str]  # of argv, from the checkpoint to start from
    note: str | None  # what is taken over, for the user


def plan(command: str, argv: list[str]) -> tuple[argparse.Namespace, list[Stage]]:
    """The stages to run, every name, path and field checked.

    Raises:
        CommandLineError, ConfigError, CheckpointError, DataError: one line each.
    """
    args, fields = build_parser(command).parse_known_args(argv)
    if args.config is None:
        unknown = [argument.split("=")[0] for argument in fields if argument.startswith("--")]
        meant = [flag for flag in unknown if difflib.get_close_matches(flag, ["--config"])]
        raise CommandLineError(
            f"unknown flag {meant[0]}; did you mean --config?" if meant else "--config is missing; --help lists presets"
        )
    for field, flag in _OF_THE_LAUNCHER.items():
        if _says(fields, field):
            raise CommandLineError(f"--{field} is set for each stage by {flag}; use that")
    check_flags(args)
    fields += _given(args)
    stages = []
    if args.stage in ("0", "both"):
        stages.append(_va_stage(args, fields))
    if args.stage in ("1", "both"):
        stages.append(_vla_stage(args, fields, stages))
    return args, stages


def _given(args: argparse.Namespace) -> list[str]:
    """The launcher's own flags as fields of ``TrainConfig``, of both stages."""
    fields = []
    for flag, field in (
        ("bs", "bs"),
        ("max_iter", "max_iterations"),
        ("accum", "gradient_accumulation_steps"),
        ("backend", "backend"),
        ("ds_zero", "ds_zero"),
        ("save_interval", "save_interval"),
    ):
        if getattr(args, flag) is not None:
            fields += [f"--{field}", str(getattr(args, flag))]
    if args.gpus is not None:
        fields += ["--device", "cpu" if args.gpus.startswith("cpu") else "cuda"]
    if args.gc:
        fields += ["--use_gradient_checkpointing", "True"]
    return fields


def _va_stage(args: argparse.Namespace, fields: list[str]) -> Stage:
    pretrained = getattr(args, "pretrained_ckpt", None)
    own = ["--train_stage", "0", "--name", _va_name(args)]
    start: Path | None = None
    if args.va_conti:
        own += ["--resume", "True"]
        start = _of_run(args, fields + own, args.va_conti)
    if args.stage == "both":
        own += [
            word for field, off in _TRAINING_THE_VLM.items() if _says(fields, field) for word in (f"--{field}", off)
        ]
    if pretrained and not args.va_conti:
        own += ["--pretrained_ckpt", pretrained]
        start = find_checkpoint(pretrained, _ckpt_dir(args, fields + own))
        if Origin.of(load_checkpoint(start)).stage == 1:
            raise CommandLineError(
                f"--pretrained-ckpt {pretrained} is a VLA already, and stage 0 trains a VA prior; use --stage 1"
            )
    return _stage(args, fields + own, start)


def _vla_stage(args: argparse.Namespace, fields: list[str], before: list[Stage]) -> Stage:
    """``before``: the stage 0 of the same command, if it has one."""
    one_stage = getattr(args, "one_stage", False)
    own = ["--train_stage", "1", "--name", args.vla_conti or args.vla_name or f"{args.config}_vla"]
    if args.vlm_mode is not None:
        own += ["--vlm_finetune_mode", args.vlm_mode]
    if args.vlm_lr is not None:
        own += ["--vlm_lr", str(args.vlm_lr)]
    start: Path | None = None
    if args.vla_conti:
        own += ["--resume", "True"]
        start = _of_run(args, fields + own, args.vla_conti)
    elif one_stage and (_says(fields, "pretrained_ckpt") or _says(fields, "load_from_va")):
        raise CommandLineError("--one-stage starts from fresh weights; leave --pretrained_ckpt and --load_from_va out")
    elif not one_stage and not _says(fields, "pretrained_ckpt"):
        if before:
            start, upstream = None, ["--pretrained_ckpt", before[0].config.name, "--load_from_va", "True"]
            fields = fields + before[0].taken_over
        else:
            start, upstream = _upstream(args, fields + own)
        own += upstream
    return _stage(args, fields + own, start)


def _upstream(args: argparse.Namespace, fields: list[str]) -> tuple[Path, list[str]]:
    """Where stage 1 starts: a stage-0 run of that name, or the pretrained checkpoint; its file, and fields."""
    pretrained = getattr(args, "pretrained_ckpt", None)
    if "pretrained_ckpt" in args and not pretrained and not (args.va_name or args.va_conti):
        raise CommandLineError("--pretrained-ckpt is missing: the run name or .pt to fine-tune from")
    ckpt_dir = _ckpt_dir(args, fields)
    if pretrained and not args.va_name:
        path = find_checkpoint(pretrained, ckpt_dir)
        expand = Origin.of(load_checkpoint(path)).stage == 0
        return path, ["--pretrained_ckpt", pretrained, "--load_from_va", str(expand)]
    try:
        path = find_checkpoint(_va_name(args), ckpt_dir)
    except CheckpointError as error:
        if args.va_name or args.va_conti:
            raise
        raise CommandLineError(
            f"stage 1 starts from a VA prior: {error}; --va-name names its run, --one-stage does without"
        ) from error
    return path, ["--pretrained_ckpt", _va_name(args), "--load_from_va", "True"]


def _of_run(args: argparse.Namespace, fields: list[str], name: str) -> Path:
    return Path(_ckpt_dir(args, fields)) / name / LATEST


def _ckpt_dir(args: argparse.Namespace, fields: list[str]) -> str:
    return parse_train_config(["--config", args.config, *fields]).ckpt_dir


def _va_name(args: argparse.Namespace) -> str:
    return args.va_conti or args.va_name or f"{args.config}_va"


def _says(fields: list[str], field: str) -> bool:
    return any(argument.split("=")[0].removeprefix("--").replace("-", "_") == field for argument in fields)


def _stage(args: argparse.Namespace, fields: list[str], start: Path | None) -> Stage:
    """``start``: the checkpoint to go on from, whose policy this is where ``fields`` say nothing else."""
    taken: dict[str, tuple[str, str]] = {}
    if start is not None:
        with contextlib.suppress(CheckpointError):  # a file without its configuration is fine to start from
            taken = inherited(read_config(start), get_config(args.config), functools.partial(_says, fields))
    argv = ["--config", args.config, *as_flags(taken), *fields]
    config = parse_train_config(argv)
    check_run_dir(config)
    if config.backend == "deepspeed":
        check_deepspeed()
        deepspeed_settings(config)
    for dataset in config.dataset_classes:
        get_dataset_class(dataset).locations()
    if config.image_text_pairs is not None:
        scan_pairs(Path(config.image_text_pairs))
    told = ", ".join(f"{field} {value} ({args.config}: {preset})" for field, (value, preset) in taken.items())
    return Stage(config, argv, as_flags(taken), f"as in {start}: {told}" if taken else None)
