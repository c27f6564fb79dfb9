"""What ``scripts/train.sh`` and ``scripts/finetune.sh`` do: check everything, then run one stage after the other."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

from apt.checkpoint import LATEST, CheckpointError, find_checkpoint, load_checkpoint
from apt.cli import CommandLineError, parse_train_config
from apt.configs import CONFIGS, ConfigError, TrainConfig
from apt.model.encoders.hub import VLMLoadError
from apt.model.pretrained import Origin
from data_utils.data_loc import locate
from data_utils.errors import DataError
from train_utils import resume_command
from train_utils.deepspeed_settings import check_deepspeed, deepspeed_settings
from train_utils.failures import FAILED, MISTAKE, NODE_TIMEOUT, TOLD
from train_utils.plan import describe_plan
from train_utils.run_dir import check_run_dir

REPOSITORY = Path(__file__).resolve().parent.parent
# Fields on how the VLM trains, which stage 0 keeps frozen: given for both stages, they are meant for stage 1.
_TRAINING_THE_VLM = {"lm_loss_weight": "0", "image_text_pairs": "None"}
MEETING_PORT = 29500  # that several machines must agree on


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage as it will be run."""

    config: TrainConfig
    argv: list[str]  # of apt.train


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise CommandLineError(f"{message}; --help lists the flags")


def build_parser(command: str) -> argparse.ArgumentParser:
    finetune = command == "finetune"
    parser = _Parser(
        prog=f"scripts/{command}.sh",
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
    add("--config", help=f"preset of apt/configs.py: {', '.join(sorted(CONFIGS))}")
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
    if not 0 <= args.node_rank < args.nnodes:
        raise CommandLineError(f"--node-rank is {args.node_rank}; with --nnodes {args.nnodes}, wanted 0 to nnodes - 1")
    if args.port is not None and not 0 < args.port < 65536:
        raise CommandLineError(f"--port is {args.port}; wanted 1 to 65535")
    one_stage = getattr(args, "one_stage", False)
    if one_stage and (args.stage != "1" or args.va_name or args.va_conti):
        raise CommandLineError(
            "--one-stage trains without a VA prior: give --stage 1, and neither --va-name nor --va-conti"
        )
    if args.node_timeout <= 0:
        raise CommandLineError(f"--node-timeout is {args.node_timeout:g}; wanted more than 0 seconds")
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
        check_gpus(args.gpus, present=not args.dry_run)
    if args.gc:
        fields += ["--use_gradient_checkpointing", "True"]
    stages = []
    pretrained = getattr(args, "pretrained_ckpt", None)
    if args.stage in ("0", "both"):
        name = args.va_conti or args.va_name or f"{args.config}_va"
        own = ["--train_stage", "0", "--name", name] + (["--resume", "True"] if args.va_conti else [])
        if args.stage == "both":
            own += [
                word for field, off in _TRAINING_THE_VLM.items() if _says(fields, field) for word in (f"--{field}", off)
            ]
        if pretrained and not args.va_conti:
            own += ["--pretrained_ckpt", pretrained]
            ckpt_dir = parse_train_config(["--config", args.config, *fields, *own]).ckpt_dir
            if Origin.of(load_checkpoint(find_checkpoint(pretrained, ckpt_dir))).stage == 1:
                raise CommandLineError(
                    f"--pretrained-ckpt {pretrained} is a VLA already, and stage 0 trains a VA prior; use --stage 1"
                )
        stages.append(_stage(args, fields + own))
    if args.stage in ("1", "both"):
        name = args.vla_conti or args.vla_name or f"{args.config}_vla"
        own = ["--train_stage", "1", "--name", name]
        if args.vlm_mode is not None:
            own += ["--vlm_finetune_mode", args.vlm_mode]
        if args.vlm_lr is not None:
            own += ["--vlm_lr", str(args.vlm_lr)]
        if args.vla_conti:
            own += ["--resume", "True"]
        elif one_stage and (_says(fields, "pretrained_ckpt") or _says(fields, "load_from_va")):
            raise CommandLineError(
                "--one-stage starts from fresh weights; leave --pretrained_ckpt and --load_from_va out"
            )
        elif not one_stage and not _says(fields, "pretrained_ckpt"):
            own += _upstream(args, stages, fields + own, pretrained)
        stages.append(_stage(args, fields + own))
    return args, stages


def _stage(args: argparse.Namespace, fields: list[str]) -> Stage:
    argv = ["--config", args.config, *fields]
    config = parse_train_config(argv)
    check_run_dir(config)
    if config.backend == "deepspeed":
        check_deepspeed()
        deepspeed_settings(config)
    for dataset in config.dataset_classes:
        locate(dataset)
    if config.image_text_pairs is not None:
        from data_utils.batches.image_text import scan_pairs

        scan_pairs(Path(config.image_text_pairs))
    return Stage(config, argv)


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


def _says(fields: list[str], field: str) -> bool:
    return any(argument.split("=")[0].removeprefix("--").replace("-", "_") == field for argument in fields)


def _upstream(args: argparse.Namespace, stages: list[Stage], fields: list[str], pretrained: str | None) -> list[str]:
    """Where stage 1 starts: this run's stage 0, a stage-0 run of that name, or the pretrained checkpoint."""
    if stages:
        return ["--pretrained_ckpt", stages[0].config.name, "--load_from_va", "True"]
    if "pretrained_ckpt" in args and not pretrained and not (args.va_name or args.va_conti):
        raise CommandLineError("--pretrained-ckpt is missing: the run name or .pt to fine-tune from")
    ckpt_dir = parse_train_config(["--config", args.config, *fields]).ckpt_dir
    if pretrained and not args.va_name:
        path = find_checkpoint(pretrained, ckpt_dir)
        expand = Origin.of(load_checkpoint(path)).stage == 0
        return ["--pretrained_ckpt", pretrained, "--load_from_va", str(expand)]
    name = args.va_conti or args.va_name or f"{args.config}_va"
    find_checkpoint(name, ckpt_dir)
    return ["--pretrained_ckpt", name, "--load_from_va", "True"]


def run_stage(args: argparse.Namespace, stage: Stage, continued: str) -> int:
    """Run one stage to its end. SIGTERM and SIGINT reach the workers, which save and stop.

    Args:
        continued: the command line that would resume it.
    Returns:
        Its exit code, ``TOLD`` where it was told to stop before the loop in which it saves.
    """
    environment = dict(os.environ)
    workers = _workers(args, stage)
    if args.gpus and not args.gpus.startswith("cpu"):
        environment["CUDA_VISIBLE_DEVICES"] = args.gpus
    command = [sys.executable]
    if workers * args.nnodes > 1:
        command += ["-m", "train_utils.ranks", f"--nproc_per_node={workers}"]
        if args.nnodes == 1 and args.port is None:
            command += ["--standalone", "--local_addr=127.0.0.1"]  # runs side by side must not meet
        else:
            command += [f"--nnodes={args.nnodes}", f"--node_rank={args.node_rank}"]
            command += [f"--node_timeout={args.node_timeout}", f"--master_addr={args.master_addr}"]
            command += [f"--master_port={MEETING_PORT if args.port is None else args.port}"]
    command += ["-m", "apt.train", *stage.argv]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(REPOSITORY), environment.get("PYTHONPATH")]))
    environment[resume_command.VARIABLE] = continued
    process: subprocess.Popen | None = None
    told = 0.0

    def stop(number: int, _frame) -> None:
        nonlocal told
        number = signal.Signals(number)
        again = told and number == signal.SIGINT and time.monotonic() - told > 1
        if process is not None:
            process.send_signal(signal.SIGQUIT if again else signal.SIGTERM)
        if not told:
            told = time.monotonic()
            ctrl_c = number == signal.SIGINT
            what = "Ctrl-C (SIGINT): stopping; again: without saving" if ctrl_c else f"{number.name}: stopping"
            with contextlib.suppress(OSError):  # the terminal may be gone
                os.write(1, f"{what}\n".encode())  # not print, which may be what the signal has interrupted

    handled = [n for n in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP) if signal.getsignal(n) != signal.SIG_IGN]
    previous = {number: signal.signal(number, stop) for number in handled}
    try:
        # A session of its own: a Ctrl-C in the terminal comes here first, and workers are told once.
        process = subprocess.Popen(command, env=environment, start_new_session=True)
        if told:  # before there was a process to tell
            process.send_signal(signal.SIGTERM)
        code = process.wait()
        return TOLD if told and code == -signal.SIGTERM else code
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _workers(args: argparse.Namespace, stage: Stage) -> int:
    """Processes on this machine."""
    if args.gpus:
        return len(args.gpus.split(","))
    if stage.config.device == "cpu":
        return 1
    import torch

    return max(1, torch.cuda.device_count())


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    command, *rest = argv
    try:
        args, stages = plan(command, rest)
        if args.dry_run:
            for stage in stages:
                print(describe_plan(stage.config, _workers(args, stage) * args.nnodes))
            return 0
    except (CommandLineError, ConfigError, CheckpointError, DataError, VLMLoadError) as error:
        print(f"error: {error}", file=sys.stderr)
        return MISTAKE
    for stage in stages:
        latest = stage.config.run_dir / LATEST
        before = latest.stat().st_mtime if latest.exists() else None
        code = run_stage(args, stage, _continued(command, rest, stages, stage, saved=True))
        if code:
            saved = latest.exists()
            saved_now = saved and latest.stat().st_mtime != before
            again = f"{'resume' if saved else 'start again'} with: {_continued(command, rest, stages, stage, saved)}"
            if code == TOLD:
                when = "" if saved_now else " before the first step"
                print(f"[stage {stage.config.train_stage}] stopped{when}; {again}")
                return 0
            if code != MISTAKE or saved_now:
                ended = f"ended with exit code {code}" if code > 0 else f"was ended by {signal.Signals(-code).name}"
                print(f"error: stage {stage.config.train_stage} {ended}; {again}", file=sys.stderr)
            return code if code > 0 else FAILED
        if stage is not stages[-1]:
            done = load_checkpoint(latest)["current_iters"]
            if done < stage.config.max_iterations:  # stopped by a signal: it saved, and said how to resume
                return 0
    return 0


def _continued(command: str, argv: list[str], stages: list[Stage], stage: Stage, saved: bool) -> str:
    script = REPOSITORY / "scripts" / f"{command}.sh"
    shown = script.relative_to(REPOSITORY) if Path.cwd() == REPOSITORY else script
    names = {other.config.train_stage: other.config.name for other in stages}
    return resume_command.continue_command(str(shown), argv, stage.config.train_stage, names, saved)


if __name__ == "__main__":
    sys.exit(main())
