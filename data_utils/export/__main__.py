"""``python -m data_utils.export --src DIR --out DIR``: episode files to a LeRobot v3.0 dataset."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from data_utils.cli import CommandLineError, check_writable, cores, parse
from data_utils.errors import DataError


@dataclass(frozen=True)
class Settings:
    """Episode files to a LeRobot v3.0 dataset."""

    src: Path
    """Folder of the episode files, searched with its sub-folders."""
    out: Path
    """Folder of the dataset; must not exist."""
    fps: int | None = None
    """Frames per second that the dataset states, 1 to 1000; what the timestamps say where it is not given."""
    workers: int = cores()
    """Processes that encode videos."""


def main(argv: list[str]) -> int:
    """Exit code: 0; 2 where nothing could be exported; 130 after Ctrl-C."""
    try:
        settings = parse(Settings, argv, "python -m data_utils.export", Settings.__doc__)
        check_writable(settings.out.parent, "--out")
        from data_utils.export.lerobot import export

        info = export(settings.src, settings.out, settings.fps, settings.workers)
    except (CommandLineError, DataError) as error:
        print(f"python -m data_utils.export: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("python -m data_utils.export: interrupted; nothing was written", file=sys.stderr)
        return 130
    print(f"{info['total_episodes']} episodes, {info['total_frames']} frames, {info['fps']} fps: {settings.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
