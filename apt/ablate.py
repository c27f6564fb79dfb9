"""The paper's ablations: train and judge every cell of a grid, and write one table and one chart of it.

    python -m apt.ablate --grid architectures --config ablate_cpu --seeds 2 --jobs 2

The same command goes on where it was stopped. ``--field value`` sets a field of TrainConfig in all cells.
docs/ablations.md says what the grids are.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import fcntl
import importlib.util
import os
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from apt.ablation.evaluation import EVALUATIONS, EvaluationSizes, load_evaluation
from apt.ablation.grid import GRIDS, Cell, Grid, Iterations, expand, files_digest, select_rows
from apt.ablation.presets import Sizes, sizes_for
from apt.ablation.report import build_report, markdown, write_tables
from apt.ablation.results import REPOSITORY
from apt.ablation.runner import Pace, Runner
from apt.ablation.study import KINDS, Recording, Step, Study, StudyError, gpus_of_jobs
from apt.ablation.worlds import WORLDS, World
from apt.configs import TrainConfig
from apt.presets import CONFIGS
from apt.training.cli import parse_train_config
from apt.training.flags import check_gpus
from apt.training.resume_command import with_environment
from data_utils.cli import CommandLineError, Parser, check_writable, cores
from data_utils.data_loc import LOCATION_VARIABLE
from data_utils.words import format_duration
from train_utils.errors import ConfigError
from train_utils.failures import FAILED, MISTAKE

MOST_RECORDERS = 16  # simulators side by side
_GIVEN = "name ckpt_dir log_dir train_stage seed resume max_iterations pretrained_ckpt load_from_va device".split()


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m apt.ablate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Any further --field value pairs set fields of TrainConfig (python -m apt.train --help lists them).",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--grid", required=True, choices=sorted(GRIDS))
    add("--config", required=True, help="preset of apt/presets.py, e.g. ablate_cpu or ablate")
    add("--seeds", type=int, default=2, help="runs of every row (default: %(default)s)")
    add("--rows", metavar="NAME,...", help="these rows of the grid alone (default: all)")
    add("--out", type=Path, default=Path("ablation_out"), help="folder of everything (default: %(default)s)")
    add("--results", type=Path, help="folder of the cells' results, a small file each (default: results under --out)")
    add("--cells", metavar="NAME,...", help="run these cells alone, e.g. ki_2stage/seed1 (default: all)")
    add("--jobs", type=int, help="cells side by side (default: 1, or one per GPU)")
    add("--gpus", help="GPU indices, e.g. 0,1,2,3, shared out among the jobs; or cpu (default: all GPUs, else the CPU)")
    add("--demos", type=Path, help="recorded data, with folders train and test (default: recorded under --out)")
    add(
        "--evaluation", help=f"{', '.join(EVALUATIONS)}, or module:function (default: in the demonstrations' simulator)"
    )
    add("--dry-run", action="store_true", help="list the cells, what is done and how long the rest takes; run nothing")
    add("--report", action="store_true", help="write table and chart of what is there; run nothing")
    sizes = parser.add_argument_group("sizes (default, as of all below: the preset's)")
    sizes.add_argument("--va-iter", type=int, help="training steps of a VA prior")
    sizes.add_argument("--vla-iter", type=int, help="of a VLA")
    one_stage = "of a VLA without a prior (default: --vla-iter; grid claim: --va-iter and --vla-iter together)"
    sizes.add_argument("--one-stage-iter", type=int, help=one_stage)
    sizes.add_argument("--demo-episodes", type=int, help="demonstrations to record")
    flags = "further flags of the program that records them, e.g. '--nearest 0.95'; held-out ones are as ever"
    sizes.add_argument("--demo-flags", type=shlex.split, default=[], metavar="FLAGS", help=flags)
    sizes.add_argument("--demo-test-episodes", type=int, help="held-out demonstrations to record")
    for field in dataclasses.fields(EvaluationSizes):
        sizes.add_argument(f"--eval-{field.name.replace('_', '-')}", type=int, help=f"evaluation's {field.name}")
    return parser


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything a call comes down to."""

    args: argparse.Namespace
    study: Study
    recording: Recording | None
    slots: list[str]
    pace: Pace
    steps: list[Step]
    """Of the cells that are to run and have no result."""


def plan(argv: Sequence[str]) -> Plan:
    """Checks all that can be checked before anything runs.

    Raises:
        CommandLineError, ConfigError, StudyError, ValueError: one line each.
    """
    args, fields = build_parser().parse_known_args(argv)
    for flag in ("seeds", "jobs", "va_iter", "vla_iter", "one_stage_iter", "demo_episodes", "demo_test_episodes"):
        value = getattr(args, flag)
        if value is not None and value < 1:
            raise CommandLineError(f"--{flag.replace('_', '-')} is {value}; wanted at least 1")
    grid = select_rows(GRIDS[args.grid], None if args.rows is None else args.rows.split(","))
    _check_fields(grid, fields)
    base = parse_train_config(["--config", args.config, *fields])
    if CONFIGS[args.config].train_stage != 1 or base.train_stage != 1:
        raise ConfigError(f"--config {args.config} is of stage 0; an ablation starts from a preset of stage 1")
    world = _world(base)
    evaluation = args.evaluation or (world.evaluation if world is not None else None)
    if evaluation is None:
        raise CommandLineError(
            f"--evaluation is missing: {', '.join(base.dataset_classes)} come from no simulator that is known here; "
            f"wanted {', '.join(EVALUATIONS)}, or module:function"
        )
    load_evaluation(evaluation)
    if world is not None and (args.demos is None or evaluation == world.evaluation):
        _check_simulator()
    slots = _slots(args)
    sizes = _sizes(args, grid)
    cells = expand(grid, base, args.seeds, sizes.iterations)
    out = args.out.absolute()
    data, demos, recording = _data(args, base, sizes, out)
    results = (out / "results") if args.results is None else args.results.absolute()
    study = Study(out, grid, cells, args.config, data, demos, evaluation, sizes.evaluation, results)
    study.check()
    steps = study.steps(_chosen(args, cells))
    return Plan(args, study, recording, slots, Pace(study.folder / "pace.json", sizes.pace), steps)


def _chosen(args: argparse.Namespace, cells: list[Cell]) -> list[Cell]:
    if args.cells is None:
        return cells
    by_name = {cell.name: cell for cell in cells}
    names = args.cells.split(",")
    if unknown := [name for name in names if name not in by_name]:
        raise CommandLineError(f"--cells: there is no cell {', '.join(unknown)}; wanted {', '.join(by_name)}")
    return [by_name[name] for name in names]


def _world(base: TrainConfig) -> World | None:
    """The simulated world that the training data are of, if they are."""
    return WORLDS.get(base.dataset_classes[0]) if len(base.dataset_classes) == 1 else None


def _has_simulator() -> bool:
    return importlib.util.find_spec("robosuite") is not None


def _check_simulator() -> None:
    if not _has_simulator():
        raise StudyError(
            "the simulator is not installed: run bash scripts/setup.sh, or use --demos DIR with --evaluation open_loop"
        )


def _check_fields(grid: Grid, fields: Sequence[str]) -> None:
    own = {name for row in grid.rows for name in row.changes}
    for argument in fields:
        name = argument.split("=", 1)[0].removeprefix("--").replace("-", "_")
        if not argument.startswith("--") or name not in own.union(_GIVEN):
            continue
        by = f"the rows of grid {grid.name}" if name in own else "the ablation itself"
        raise CommandLineError(f"--{name} is set by {by}; leave it out")


def _sizes(args: argparse.Namespace, grid: Grid) -> Sizes:
    """The preset's, with what the command line changes."""
    preset = sizes_for(args.config)
    names = [field.name for field in dataclasses.fields(EvaluationSizes)]
    given = {name: getattr(args, f"eval_{name}") for name in names}
    evaluation = {name: value for name, value in given.items() if value is not None}
    va, vla = args.va_iter or preset.iterations.va, args.vla_iter or preset.iterations.vla
    one_stage = args.one_stage_iter or (va + vla if grid.even else args.vla_iter or preset.iterations.one_stage)
    return Sizes(
        args.demo_episodes or preset.episodes,
        args.demo_test_episodes or preset.test_episodes,
        Iterations(va, vla, one_stage),
        dataclasses.replace(preset.evaluation, **evaluation),
        preset.pace,
    )


def _slots(args: argparse.Namespace) -> list[str]:
    """GPUs of each job."""
    gpus = args.gpus
    if gpus is None:
        import torch

        gpus = ",".join(map(str, range(torch.cuda.device_count()))) or "cpu"
    check_gpus(gpus, present=not (args.dry_run or args.report))
    if gpus.startswith("cpu"):
        return [gpus] * (args.jobs or 1)
    indices = gpus.split(",")
    return gpus_of_jobs(indices, args.jobs or len(indices))


def _data(
    args: argparse.Namespace, base: TrainConfig, sizes: Sizes, out: Path
) -> tuple[dict, Path | None, Recording | None]:
    """What identifies the data, their folder, and how they are recorded; None for what there is not."""
    world = _world(base)
    if args.demo_flags and (args.demos is not None or world is None):
        raise CommandLineError("--demo-flags are of demonstrations that are recorded; these are there already")
    if args.demos is not None:
        demos = args.demos.absolute()
        for part in ("train", "test"):
            if not (demos / part).is_dir():
                raise StudyError(f"--demos {demos} has no folder {part}; wanted train and test, as recorded")
        base.data_configs()
        return {"files": files_digest(demos)}, demos, None
    if world is None:
        return {"located": list(base.dataset_classes)}, None, None  # the user's own, as in training
    workers = min(cores(), MOST_RECORDERS)
    image_size, flags = sizes.evaluation.image_size, tuple(args.demo_flags)
    recording = Recording(sizes.episodes, sizes.test_episodes, image_size, workers, world, train_flags=flags)
    return recording.settings, out / "demos", recording


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else list(argv)
    try:
        planned = plan(argv)
        if planned.args.dry_run:
            print(describe(planned))
            return 0
        if planned.args.report:
            return _report(planned)
        check_writable(planned.study.out, "--out")
        with _alone(planned.study.out):
            return _run(planned, argv)
    except (CommandLineError, ConfigError, StudyError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return MISTAKE


def describe(planned: Plan) -> str:
    """The cells, what is done, and an estimate."""
    study = planned.study
    lines = [f"grid {study.grid.name}, {len(study.cells)} cells in {study.folder}"]
    recording = [] if planned.recording is None or not planned.steps else planned.recording.steps(study.demos)
    steps = [*recording, *planned.steps]
    for cell in study.cells:
        own = [step for step in steps if cell in step.cells]
        done = sum(step.finished() for step in own)
        state = f"{done} of {len(own)} steps done" if own else "done"
        if not own and study.result(cell) is None:
            state = "left out"
        failure = study.failure(cell)
        lines.append(f"  {cell.name:<32} {state}" + (f"; failed before: {failure}" if failure else ""))
    parts = planned.pace.seconds(recording, 1), planned.pace.seconds(steps[len(recording) :], len(planned.slots))
    left = None if None in parts else sum(parts)
    kinds = "; ".join(
        f"{sum(step.left() > 0 for step in steps if step.kind == kind)} x {kind}"
        for kind in KINDS
        if any(step.kind == kind for step in steps)
    )
    lines.append(f"left: {kinds}")
    about = (
        "no estimate before the first step of each kind has run" if left is None else f"about {format_duration(left)}"
    )
    lines.append(f"time: {about}, {len(planned.slots)} side by side on {', '.join(planned.slots)}")
    return "\n".join(lines)


def _run(planned: Plan, argv: Sequence[str]) -> int:
    study, began = planned.study, time.monotonic()

    def say(line: str) -> None:
        print(f"[{format_duration(time.monotonic() - began)}] {line}", flush=True)

    def note(step: Step, words: str) -> None:
        for cell in step.cells:
            study.note_failure(cell, f"{step.title}: {words}")

    study.prepare()
    for cell in study.cells:
        study.note_failure(cell, None)  # it gets another chance
    environment = _environment(study, cores() // len(planned.slots))
    runner = Runner(planned.slots, environment, planned.pace, say, note)
    # Recording has processes of its own, one per core.
    alone = Runner(planned.slots[:1], _environment(study, 1), planned.pace, say, note)
    with alone.catching():
        if planned.recording is not None and planned.steps:
            alone.run(planned.recording.steps(study.demos))
    if alone.failures:
        print(f"error: {alone.failures[0].title} failed; see {alone.failures[0].log}", file=sys.stderr)
        return FAILED
    if alone.signal is None:
        with runner.catching():
            runner.run(planned.steps)
    told = alone.signal or runner.signal
    if told is not None:
        say(f"stopped; go on with: {with_environment(['python', '-m', 'apt.ablate', *argv])}")
        return 128 + told
    return _report(planned)


def _environment(study: Study, threads: int) -> dict[str, str]:
    """Of the processes: threads of numerics and of the software rasteriser, where modules and data are."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "LP_NUM_THREADS")
    environment = {name: str(max(1, threads)) for name in names}
    # An evaluation of one's own may lie where the command was given.
    paths = [str(REPOSITORY), os.getcwd(), os.environ.get("PYTHONPATH")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    if study.demos is not None:
        environment[LOCATION_VARIABLE] = str(study.data_location)
    return environment | {"PYTHONUNBUFFERED": "1"}


def _report(planned: Plan) -> int:
    from apt.ablation.chart import write_chart  # matplotlib is slow to import
    from apt.ablation.curves import write_curves

    report, folder = build_report(planned.study), planned.study.folder
    folder.mkdir(parents=True, exist_ok=True)
    table, text = write_tables(report, folder)
    chart = write_chart(report, folder)
    files = [table, text, chart, *filter(None, [write_curves(report, folder)])]
    print(f"\n{markdown(report)}\n" + "\n".join(map(str, files)))
    failed = sum(len(line.failed) for line in report.lines)
    if failed:
        print(
            f"error: {failed} of {len(planned.study.cells)} cells failed; the same command tries them again",
            file=sys.stderr,
        )
    return FAILED if failed else 0


@contextlib.contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Context in which no other ablation uses the folder. Raises ``StudyError``."""
    out.mkdir(parents=True, exist_ok=True)
    with open(out / ".lock", "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StudyError(f"another ablation is running in {out}; wait for it, or give another --out") from None
        yield


if __name__ == "__main__":
    sys.exit(main())
