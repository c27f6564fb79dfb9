"""``python -m data_utils.calibrate SUBCOMMAND``: boards, lenses and camera poses, into one camera rig."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from data_utils.calibrate.commands import BoardOptions, FixedOptions, IntrinsicsOptions, WristOptions
from data_utils.calibrate.from_robot import FromRobotOptions
from data_utils.cli import CommandLineError, parse
from data_utils.words import one_line

PROG = "python -m data_utils.calibrate"
COMMANDS = {
    "board": BoardOptions,
    "intrinsics": IntrinsicsOptions,
    "fixed": FixedOptions,
    "wrist": WristOptions,
    "from-robot": FromRobotOptions,
}


def main(argv: Sequence[str]) -> int:
    """Exit code: 0, 1 for input that cannot be calibrated from, 2 for a wrong command, 130 after Ctrl-C."""
    if not argv or argv[0] in ("-h", "--help"):
        print(_usage(), file=sys.stdout if argv else sys.stderr)
        return 0 if argv else 2
    try:
        if argv[0] not in COMMANDS:
            raise CommandLineError(f"unknown sub-command {argv[0]!r}; known: {', '.join(COMMANDS)}")
        options = COMMANDS[argv[0]]
        parse(options, argv[1:], f"{PROG} {argv[0]}", options.__doc__).run()
    except (ValueError, OSError) as error:  # CommandLineError and DataError are the former
        print(f"{PROG}: {one_line(error, None)}", file=sys.stderr)
        return 2 if isinstance(error, CommandLineError) else 1
    except KeyboardInterrupt:
        print(f"{PROG}: interrupted", file=sys.stderr)
        return 130
    return 0


def _usage() -> str:
    lines = "\n".join(f"  {name:11} {options.__doc__}" for name, options in COMMANDS.items())
    return f"{PROG} SUBCOMMAND ...\n{lines}\nSUBCOMMAND --help lists flags."


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
