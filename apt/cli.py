"""The command ``apt-vla`` of an installed package: a word for each program that a clone runs as ``python -m``."""

from __future__ import annotations

import argparse
import importlib
import sys
from dataclasses import dataclass

from apt import __version__

NAME = "apt-vla"


@dataclass(frozen=True)
class Program:
    """Args: module with a ``main`` that takes arguments and returns an exit code; given: before a user's own."""

    module: str
    help: str
    given: tuple[str, ...] = ()


PROGRAMS = {
    "train": Program("apt.training.launch", "train a policy: VA prior, then VLA", ("train",)),
    "finetune": Program("apt.training.launch", "adapt a policy to one's own robot or task", ("finetune",)),
    "serve": Program("apt.infer.remote_service", "serve a policy to robots over shared memory and sockets"),
    "serve-openpi": Program("apt.infer.openpi_service", "serve a policy over openpi's websocket protocol"),
    "status": Program("apt.infer.remote_service", "what a running service is doing", ("--status",)),
    "convert": Program("data_utils.convert.__main__", "LIBERO, LeRobot or robomimic to episodes"),
    "inspect": Program("data_utils.inspect.__main__", "look at episodes: contents, faults, pictures"),
    "calibrate": Program("data_utils.calibrate.__main__", "boards, lenses and camera poses, into a camera rig"),
    "index": Program("data_utils.index.__main__", "build the index of a place of episodes"),
    "export": Program("data_utils.export.__main__", "episodes to LeRobot"),
    "open-loop": Program("apt.infer.open_loop", "a policy against recorded episodes"),
    "checkpoint": Program("apt.checkpoint", "checkpoints as folders, to and from the Hub"),
    "slim": Program("apt.infer.slim", "a policy to hand on: averaged weights, half the bytes"),
    "doctor": Program("apt.infer.doctor", "which of set-up, data, training or control is off"),
    "demo": Program("examples.blocks.demo", "the shipped policy in its world; in a clone alone, with the simulator"),
}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=NAME, description="Action expert pretraining for vision-language-action policies.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"{NAME} {__version__}")
    shells = ("bash", "zsh", "tcsh")
    how = f'completion for a shell: eval "$({NAME} --print-completion bash)"'
    parser.add_argument("--print-completion", choices=shells, help=how)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands (each has --help)")
    for name, program in PROGRAMS.items():
        commands.add_parser(name, help=program.help, add_help=False)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Exit code: the program's own; 2 for a wrong command."""
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in PROGRAMS:
        return _run(PROGRAMS[argv[0]], argv[1:])
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.print_completion:
        return _print_completion(parser, args.print_completion)
    parser.print_help(sys.stderr)
    return 2


def _run(program: Program, argv: list[str]) -> int:
    try:
        module = importlib.import_module(program.module)
    except ModuleNotFoundError as error:
        if error.name is None or not program.module.startswith(error.name):
            raise
        where = "comes with a clone of the repository, not with the installed package"
        print(f"error: {program.module} {where}", file=sys.stderr)
        return 2
    code = module.main([*program.given, *argv])
    return 0 if code is None else code


def _print_completion(parser: argparse.ArgumentParser, shell: str) -> int:
    try:
        import shtab
    except ImportError:
        print("error: completion needs shtab, which is not installed; run: pip install shtab", file=sys.stderr)
        return 2
    print(shtab.complete(parser, shell))
    return 0
