"""``python -m data_utils.inspect PATH``: what episodes hold, everything that is wrong with them, and pictures of one.

Files are read in checking processes (``data_utils.checks``): damage that crashes or hangs the HDF5 library is a fault
of the file, and the rest goes on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import tyro

from data_utils.checks.checker import FileChecker, Report, Request
from data_utils.checks.contents import Contents
from data_utils.cli import CommandLineError, bar, check_writable, parse
from data_utils.config import DataConfig
from data_utils.data_loc import episode_files
from data_utils.datasets import get_dataset_class
from data_utils.errors import DataError, Fault
from data_utils.files import write_json
from data_utils.inspect.inspected import Inspected
from data_utils.inspect.parts import part_file, part_files, read_part, write_part
from data_utils.inspect.texts import count_text, episode_lines, set_lines, speed_lines
from data_utils.rig import read_rig
from data_utils.shards import Shard
from data_utils.words import counted, one_line

PROG = "python -m data_utils.inspect"
MEASURED_EPISODES = 200  # of large sets
CHUNK = 5000  # files between two writes of a part


@dataclass(frozen=True)
class Options:
    """Flags of the command."""

    paths: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="PATH...", help_behavior_hint="")]
    """Episode files, folders (with their sub-folders) or quoted globs."""
    dataset_class: str = ""
    """Check against this dataset class too (its cameras and arms), and draw what its policy sees."""
    quick: bool = False
    """Decode the first, middle and last frame of each camera instead of all."""
    out: Path | None = None
    """Folder of the pictures (default: inspect_out/<name of the episode>)."""
    frames: int = 4
    """Rows of the picture, spread over the episode; 0: no pictures."""
    video: bool = False
    """Write the whole episode as an MP4 too, with the path drawn."""
    episode: int | None = None
    """Which of several episodes is drawn, counted from 0 in the order of their names (default: the first good one)."""
    rig: Path | None = None
    """Draw with the calibration of this camera rig instead of the recorded one, and say how far they are apart."""
    video_root: str | None = None
    """Folder of the videos (default: what the files say)."""
    video_reader: Literal["decord", "torchcodec", "pyav"] = "decord"
    """Library that decodes videos for --speed and for what the policy sees; checks always use PyAV."""
    speed: bool = False
    """Measure how fast the good episodes are read for training."""
    reseal: bool = False
    """Renew the checksums of files that were changed on purpose, and say what had changed. Files with other faults are
    left alone, and those with other images too unless one file is named by itself."""
    workers: int | None = None
    """Checking processes (default: one per core, 16 at most)."""
    json: Path | None = None
    """Write everything found to this file."""
    shard: str | None = None
    """Check part I of N alone, 0/4 to 3/4 for instance, without pictures; the same command without it takes up what all
    parts have left beside --json, and checks what is missing."""

    def __post_init__(self) -> None:
        if self.frames < 0:
            raise ValueError(f"--frames is {self.frames}; wanted how many rows the picture has, 0 for none")
        if self.rig is not None and self.frames == 0:
            raise ValueError("--rig says what pictures are drawn with, --frames 0 asks for none; drop one of them")
        if self.video and self.frames == 0:
            raise ValueError("--video asks for a video, --frames 0 for no pictures; drop one of them")
        if Shard.parse(self.shard) is not None and (self.json is None or self.reseal or self.speed):
            raise ValueError("--shard leaves what it finds beside --json FILE, and goes without --reseal and --speed")

    @property
    def asked(self) -> dict[str, object]:
        """What findings depend on, besides the files."""
        return {"dataset_class": self.dataset_class, "quick": self.quick, "video_root": self.video_root}


def main(argv: Sequence[str]) -> int:
    """Exit code: 0 where all is well, 1 with faults, 2 for a wrong command, 130 after Ctrl-C."""
    try:
        options = parse(Options, argv, PROG, "Look at episode files: contents, faults, pictures.")
        return _run(options)
    except ValueError as error:  # CommandLineError and DataError are such
        print(f"{PROG}: {one_line(error, None)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{PROG}: interrupted", file=sys.stderr)
        return 130


def _run(options: Options) -> int:
    files = find_files(options.paths)
    if options.episode is not None and not 0 <= options.episode < len(files):
        there = f"is {len(files)} episode" if len(files) == 1 else f"are {len(files)} episodes"
        raise CommandLineError(f"--episode is {options.episode}; there {there}, counted from 0")
    _check_folders(options)
    if options.rig is not None:
        read_rig(options.rig)  # before long checks
    dataset_class = _dataset_class(options.dataset_class)
    config = dataset_class.config if dataset_class is not None else None

    def request(path: str) -> Request:
        return Request(
            path,
            depth="sampled" if options.quick and not options.reseal else "deep",
            video_root=options.video_root,
            cameras=config.cameras if config is not None else (),
            ee_indices=config.ee_indices if config is not None else (),
        )

    with FileChecker(options.workers) as checker:

        def check(paths: Sequence[str]) -> list[Report]:
            return check_with_bar(checker, [request(path) for path in paths])

        if options.reseal:
            named = len(options.paths) == 1 and Path(options.paths[0]).is_file()
            return _reseal(files, check(files), lambda path: _whole(checker.check([request(path)])[0], path), named)
        inspected = _inspect(options, files, check)
    _print_found(inspected, _counts_steps(config, inspected))

    good = [item for item in inspected if not item.faults]
    speed = None
    if options.speed and good:
        some = [good[i].path for i in np.unique(np.linspace(0, len(good) - 1, MEASURED_EPISODES).astype(int))]
        speed = _measure(options, some, good[0].contents)
        print("\n".join(["speed", *speed_lines(speed, [item.contents for item in good])]))
    drawn = inspected[options.episode] if options.episode is not None else next(iter(good), None)
    if options.frames and options.shard is None:
        if drawn is not None and not drawn.faults:
            out = options.out if options.out is not None else Path("inspect_out") / Path(drawn.path).stem
            with _writing(out, "--out"):
                _draw(options, drawn, out)
        elif len(inspected) == 1:
            print("not drawn: it has faults")
        else:
            print(f"{drawn.path} is not drawn: it has faults" if drawn else "not drawn: all episodes have faults")
    if options.json is not None and options.shard is None:
        with _writing(options.json, "--json"):
            _write_json(options.json, inspected, speed)
            for file in part_files(options.json):
                file.unlink()
    faulty = [item for item in inspected if item.faults]
    broken = [rule for item in faulty for rule in sorted({fault.rule for fault in item.faults})]
    print(count_text(len(faulty), len(inspected), broken))
    return 1 if faulty else 0


def _inspect(options: Options, files: list[str], check: Callable[[Sequence[str]], list[Report]]) -> list[Inspected]:
    """What is found in the files, or in those of a part; what parts have found already is not looked for again."""
    found: dict[str, Inspected] = {}
    if (shard := Shard.parse(options.shard)) is not None:
        if shard.index >= len(files):
            raise CommandLineError(f"--shard {options.shard} has none of {len(files)} episodes; make fewer parts")
        files = [path for number, path in enumerate(files) if shard.owns(number)]
        own = part_file(options.json, shard)
    for file in part_files(options.json) if options.json is not None else ():
        if shard is None or file == own:
            found |= read_part(file, options.asked)
    missing = [path for path in files if path not in found]
    for first in range(0, len(missing), CHUNK):
        chunk = missing[first : first + CHUNK]
        found |= {path: Inspected.of(path, report) for path, report in zip(chunk, check(chunk), strict=True)}
        if shard is not None:
            with _writing(own, "--json"):
                write_part(own, options.asked, [found[path] for path in files if path in found])
    return [found[path] for path in files]


def find_files(paths: Sequence[str]) -> list[str]:
    """Episode files of files, folders and globs, sorted and each once.

    Raises:
        CommandLineError: a path without episodes.
    """
    if not paths:
        raise CommandLineError("which episodes? name files, folders or quoted globs; --help lists the flags")
    found: list[str] = []
    for path in paths:
        here = list(episode_files(path))
        if not here:
            raise CommandLineError(f"{path} is no episode file, and no folder or glob of .h5 or .hdf5 files")
        found += here
    return sorted(set(found))


def check_with_bar(checker: FileChecker, requests: Sequence[Request]) -> list[Report]:
    """Reports in the order of the requests, their faults without the files' names."""
    with bar(total=len(requests), desc="checking", unit="episode", delay=1.0) as checked:
        reports = checker.check(requests, checked.update)
    return [_whole(report, request.path) for report, request in zip(reports, requests, strict=True)]


def _whole(report: Report, path: str) -> Report:
    """With the fault of a file that ended its checking process among the faults."""
    if not report.rule:
        return report
    fault = Fault(report.rule, report.message.removeprefix(f"{path}: "))
    return dataclasses.replace(report, rule="", message="", faults=(fault, *report.faults))


def _dataset_class(name: str):
    if not name:
        return None
    return get_dataset_class(name)


def _counts_steps(config: DataConfig | None, inspected: Sequence[Inspected]) -> bool:
    """Whether timestamps are control steps: the dataset class says so, or without one, they count the frames."""
    if config is not None:
        return config.record_dt is None and config.sample_dt == 1.0
    readable = [item.contents for item in inspected if item.contents is not None]
    return bool(readable) and all(contents.rate == 1.0 for contents in readable)


def _print_found(inspected: Sequence[Inspected], counts_steps: bool) -> None:
    if len(inspected) == 1:
        print(inspected[0].path)
        if inspected[0].contents is not None:
            print("\n".join(episode_lines(inspected[0].contents, counts_steps)))
    else:
        readable = [item.contents for item in inspected if item.contents is not None]
        print("\n".join(set_lines(readable, len(inspected), counts_steps)))
    by_rule: dict[str, list[str]] = {}
    for item in inspected:
        for rule, message in item.warnings:
            by_rule.setdefault(rule, []).append(f"{item.path}: warning, {rule}: {message}")
    for rule, lines in by_rule.items():
        shown = len(lines) if len(inspected) == 1 else 1
        print("\n".join(lines[:shown]))
        if lines[shown:]:
            print(
                f"  and {counted(len(lines) - shown, 'more warning')} about {rule} in other episodes; --json lists them"
            )
    for item in inspected:
        for rule, message in item.faults:
            print(f"{item.path}: {rule}: {message}")


def _measure(options: Options, paths: list[str], contents: Contents):
    from data_utils.inspect.speed import config_of, measure, open_dataset
    from data_utils.samples.dataset import H5DatasetMapBase

    dataset_class = _dataset_class(options.dataset_class) or H5DatasetMapBase
    config = dataset_class.config if options.dataset_class else config_of(contents)
    dataset = open_dataset(paths, dataset_class, config, options.video_root, options.video_reader)
    return measure(dataset)


def _check_folders(options: Options) -> None:
    """Say so before a long check where what it finds cannot be written."""
    if options.out is not None and options.frames and not options.reseal:
        check_writable(options.out, "--out")
    if options.json is not None:
        check_writable(options.json.parent, "--json")


@contextlib.contextmanager
def _writing(place: Path, flag: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        what = f"{place} cannot be written ({error.strerror or error}); name another place with {flag}"
        raise CommandLineError(what) from error


def _draw(options: Options, item: Inspected, out: Path) -> None:
    from data_utils.h5io import Episode
    from data_utils.inspect.calibrated import Calibrated
    from data_utils.inspect.pictures import frames_picture, policy_picture, save_png, write_video
    from data_utils.inspect.view_3d import save_view
    from data_utils.video import VideoCache

    length = item.contents.frames
    rows = min(options.frames, length)
    frames = [length * row // rows for row in range(rows)]
    horizon = -(-length // rows)  # each row shows the way to the next one
    written = [out / "frames.png", out / "view_3d.png"]
    wanted = _dataset_class(options.dataset_class).config.cameras if options.dataset_class else ()
    with Episode(item.path, None, options.video_root, VideoCache("pyav")) as episode:
        cameras = list(dict.fromkeys([*wanted, *episode.cameras]))  # the class's main camera first
        calibrated = None if options.rig is None else Calibrated(episode, read_rig(options.rig))
        if calibrated is not None:
            print("\n".join(calibrated.differences()))
        save_png(written[0], frames_picture(episode, cameras, frames, horizon, calibrated))
        save_view(written[1], episode)
        if options.video:
            written.append(out / "episode.mp4")
            write_video(written[-1], episode, cameras, horizon, item.contents.rate, calibrated)
    if options.dataset_class:
        from data_utils.inspect.speed import open_dataset

        dataset_class = _dataset_class(options.dataset_class)
        dataset = open_dataset(
            [item.path], dataset_class, dataset_class.config, options.video_root, options.video_reader, train=False
        )
        written.append(out / "policy.png")
        save_png(written[-1], policy_picture(dataset, frames))
    print("\n".join(f"wrote {path}" for path in written))


def _reseal(files: Sequence[str], reports: Sequence[Report], check, named: bool) -> int:
    from data_utils.inspect.resealing import reseal

    resealed, refused = 0, []
    for path, report in zip(files, reports, strict=True):
        try:
            changed = reseal(path, report, check, named)
            if changed:
                resealed += 1
                print(f"{path}: resealed; had changed: {', '.join(changed)}")
        except DataError as error:
            refused.append(error.rule)
            print(f"{path}: {error.rule}: {error}")
    agreed = len(files) - resealed - len(refused)
    print(f"{resealed} resealed, {agreed} agreed already, {len(refused)} left alone")
    return 1 if refused else 0


def _write_json(path: Path, inspected: Sequence[Inspected], speed) -> None:
    values = {
        "episodes": [dataclasses.asdict(item) for item in inspected],
        "faulty": sum(bool(item.faults) for item in inspected),
        "speed": None if speed is None else dataclasses.asdict(speed),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, values)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
