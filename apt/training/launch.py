"""What ``scripts/train.sh`` and ``scripts/finetune.sh`` do: check everything, then run one stage after the other."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING

from apt.training import resume_command
from apt.training.flags import MEETING_PORT, build_parser
from data_utils.cli import CommandLineError
from data_utils.errors import DataError
from train_utils.errors import ConfigError
from train_utils.failures import FAILED, MISTAKE, RESUME_VARIABLE, TOLD
from train_utils.places import LATEST

if TYPE_CHECKING:
    from apt.training.stages import Stage

COMMANDS = ("train", "finetune")


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
    environment["PYTHONPATH"] = os.pathsep.join(
        filter(None, [str(resume_command.REPOSITORY), environment.get("PYTHONPATH")])
    )
    environment[RESUME_VARIABLE] = continued
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
    if not argv or argv[0] not in COMMANDS:
        ways = "scripts/train.sh, scripts/finetune.sh, apt-vla train, apt-vla finetune"
        print(f"usage: python -m apt.training.launch train|finetune FLAGS   ({ways})")
        return 0 if argv and argv[0] in ("-h", "--help") else MISTAKE
    command, *rest = argv
    if {"-h", "--help"}.intersection(rest):
        build_parser(command).parse_args(["--help"])
    # torch and the model's libraries take seconds to import; help need not wait for them.
    from apt.checkpoint import CheckpointError, load_checkpoint
    from apt.model.encoders.hub import VLMLoadError
    from apt.training.plan import describe_plan
    from apt.training.stages import plan

    try:
        args, stages = plan(command, rest)
        for stage in stages:
            if stage.note:
                print(f"[stage {stage.config.train_stage}] {stage.note}", flush=True)
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
    names = {other.config.train_stage: other.config.name for other in stages}
    return resume_command.continue_command(command, argv, stage.config.train_stage, names, saved)


if __name__ == "__main__":
    sys.exit(main())
