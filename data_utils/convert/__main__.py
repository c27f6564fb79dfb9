"""``python -m data_utils.convert FORMAT --src ... --out ...``: other formats to episode files."""

from __future__ import annotations

import dataclasses
import importlib
import sys
from pathlib import Path
from typing import Annotated

import tyro

from data_utils.cli import CommandLineError, check_writable, cores, parse
from data_utils.convert.runner import RECORD, run
from data_utils.errors import DataError
from data_utils.shards import Shard

# Format -> module, settings, converter (made from the settings), what it reads. Imported when it is asked for: each
# needs libraries that the others do not.
FORMATS = {
    "libero": ("examples.libero.convert", "LiberoSettings", "LiberoConverter", "LIBERO's demonstrations, replayed"),
    "lerobot": ("data_utils.convert.lerobot", "LerobotSettings", "LerobotConverter", "LeRobot v2.0, v2.1 and v3.0"),
    "robomimic": ("data_utils.convert.robomimic", "RobomimicSettings", "RobomimicConverter", "robomimic's HDF5"),
}


def main(argv: list[str]) -> int:
    """Exit code: 0, 1 where an episode failed, 2 for a wrong command, 130 after Ctrl-C."""
    if not argv or argv[0] in ("-h", "--help"):
        print(_usage(), file=sys.stdout if argv else sys.stderr)
        return 0 if argv else 2
    try:
        if argv[0] not in FORMATS:
            raise CommandLineError(f"unknown format {argv[0]!r}; known: {', '.join(FORMATS)}")
        module_name, settings_name, converter_name, what = FORMATS[argv[0]]
        module = importlib.import_module(module_name)
        settings, out, workers, shard = _parse(getattr(module, settings_name), argv, what)
        check_writable(out, "--out")
        converter = getattr(module, converter_name)(settings)
        # A converter whose settings are names of files says what is in them; for others the settings are the whole.
        described = converter.described() if hasattr(converter, "described") else dataclasses.asdict(settings)
        copy_videos = getattr(converter, "copy_videos", False)
        told = {"format": argv[0], **_jsonable(described)}
        summary = run(converter, out, workers, told, copy_videos, shard=shard)
    except (CommandLineError, DataError) as error:
        print(f"python -m data_utils.convert: {error}", file=sys.stderr)
        return 2
    print(f"{summary.text()}\n  recorded in {out / RECORD.format('' if shard is None else shard.suffix)}")
    return 130 if summary.interrupted else 1 if summary.failed else 0


def _parse(settings: type, argv: list[str], what: str) -> tuple[object, Path, int, Shard | None]:
    """The format's settings, the output folder, the number of workers, and the part to convert."""
    part = "Convert part I of N alone (0/4 to 3/4); the same command without it then takes up all parts."
    arguments = dataclasses.make_dataclass(
        "Arguments",
        [
            ("settings", Annotated[settings, tyro.conf.arg(name="")]),
            ("out", Annotated[Path, tyro.conf.arg(help="Folder of the episode files.")]),
            ("workers", Annotated[int, tyro.conf.arg(help="Processes.")], dataclasses.field(default=cores())),
            ("shard", Annotated[str | None, tyro.conf.arg(help=part)], dataclasses.field(default=None)),
        ],
    )
    parsed = parse(
        arguments, argv[1:], f"python -m data_utils.convert {argv[0]}", f"{what}, converted to episode files."
    )
    return parsed.settings, parsed.out, parsed.workers, Shard.parse(parsed.shard)


def _jsonable(value):
    if isinstance(value, dict):
        return {str(key): _jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _usage() -> str:
    formats = "\n".join(f"  {name:10} {entry[3]}" for name, entry in FORMATS.items())
    flags = "FORMAT --src ... --out ... [--workers N] [--shard I/N]"
    return f"python -m data_utils.convert {flags}\n{formats}\nFORMAT --help lists flags."


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
