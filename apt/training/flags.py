"""The flags of ``scripts/train.sh`` and ``scripts/finetune.sh``, and which of them contradict each other."""

from __future__ import annotations

import argparse
import re

from apt.presets import CONFIGS
from apt.training.resume_command import launcher
from data_utils.cli import CommandLineError, Parser
from train_utils.failures import NODE_TIMEOUT

MEETING_PORT = 29500  # that several machines must agree on


def build_parser(command: str) -> argparse.ArgumentParser:
    finetune = command == "finetune"
    program, called = launcher(command)
    parser = Parser(
        prog=f"scripts/{command}.sh" if program == "bash" else f"{program} {called}",
        description=(
            "Fine-tune a pretrained policy." if finetune else "Train a policy: stage 0 (VA prior), then stage 1 (VLA)."
        ),
        epilog=(
            "Any further --field value pairs set fields of TrainConfig (python -m apt.train --help lists them). "
            "Recipes: docs/training.md."
        ),
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--backend", choices=("ddp", "deepspeed"), help="how processes work together (default: ddp)")
    add("--ds-zero", choices=("2", "3"), help="under deepspeed, shard optimizer state (2) or parameters too (3)")
    add("--gpus", help="GPU indices, e.g. 0,1,2,3; or cpu, for two processes cpu,cpu (default: all GPUs, else the CPU)")
    add("--stage", choices=("0", "1", "both"), default="1" if finetune else "both", help="default: %(default)s")
    add("--config", help=f"preset of apt/presets.py: {', '.join(sorted(CONFIGS))}")
    add("--va-name", help="name of the stage-0 run (default: CONFIG_va)")
    add("--vla-name", help="name of the stage-1 run (default: CONFIG_vla)")
    add("--va-conti", metavar="NAME", help="resume this stage-0 run")
    add("--vla-conti", metavar="NAME", help="resume this stage-1 run")
    if finetune:
        add(
            "--pretrained-ckpt",
            metavar="CKPT",
            help="what to start from: a run name under the checkpoint root, a .pt, or an exported folder",
        )
    else:
        add(
            "--one-stage",
            action="store_true",
            help="with --stage 1: train the VLA from fresh weights, without a VA prior",
        )
    add("--bs", type=int, help="samples per process and pass (default, as of all below without one: the preset's)")
    add("--max-iter", type=int, help="iterations of each stage")
    add("--accum", type=int, help="passes per step, whose gradients are averaged")
    add("--vlm-mode", choices=("frozen", "lora", "full"), help="what of the VLM trains in stage 1")
    add("--vlm-lr", type=float, help="learning rate of the VLM's parameters (default: the expert's)")
    add("--gc", action="store_true", help="gradient checkpointing in the VLM")
    add("--save-interval", type=int, help="iterations between checkpoints that are kept, ckpt_<iteration>.pt")
    add("--dry-run", action="store_true", help="print parameters, steps, disk and memory of the run, and do nothing")
    add(
        "--port",
        "--master-port",
        type=int,
        help=f"where processes meet (default: a port that is free; of several machines {MEETING_PORT})",
    )
    add("--nnodes", type=int, default=1, help="machines (default: %(default)s)")
    add("--node-rank", type=int, default=0, help="this machine, 0 to nnodes - 1")
    add("--master-addr", default="127.0.0.1", help="address of machine 0 (default: %(default)s)")
    add(
        "--node-timeout",
        type=float,
        default=NODE_TIMEOUT,
        help="seconds of silence after which a machine counts as gone and the job ends (default: %(default)g)",
    )
    return parser


def check_gpus(gpus: str, present: bool) -> None:
    """Raises ``CommandLineError`` for what is no list of GPUs, and for one not there that must be ``present``."""
    if re.fullmatch(r"cpu(,cpu)*", gpus):
        return
    if not re.fullmatch(r"\d+(,\d+)*", gpus):
        raise CommandLineError(f"--gpus is {gpus!r}; wanted indices like 0,1,2,3, or cpu")
    if not present:
        return
    import torch

    seen = torch.cuda.device_count()
    missing = [index for index in gpus.split(",") if int(index) >= seen]
    if missing:
        raise CommandLineError(f"--gpus asks for GPU {missing[0]}, but torch sees {seen}; use --gpus cpu without one")


def check_flags(args: argparse.Namespace) -> None:
    """Raises ``CommandLineError`` for values that cannot be meant."""
    if not 0 <= args.node_rank < args.nnodes:
        raise CommandLineError(f"--node-rank is {args.node_rank}; with --nnodes {args.nnodes}, wanted 0 to nnodes - 1")
    if args.port is not None and not 0 < args.port < 65536:
        raise CommandLineError(f"--port is {args.port}; wanted 1 to 65535")
    if getattr(args, "one_stage", False) and (args.stage != "1" or args.va_name or args.va_conti):
        raise CommandLineError(
            "--one-stage trains without a VA prior: give --stage 1, and neither --va-name nor --va-conti"
        )
    if args.node_timeout <= 0:
        raise CommandLineError(f"--node-timeout is {args.node_timeout:g}; wanted more than 0 seconds")
    if args.gpus is not None:
        check_gpus(args.gpus, present=not args.dry_run)
