"""All of LIBERO at the size of the paper, on GPUs: both stages on the four suites, then twelve suites in closed loop.

    bash examples/libero/full.sh --gpus 0,1,2,3,4,5,6,7

Demonstrations of the scripted expert, or converted ones (``--demos``); VA prior and VLA of the base expert on
Qwen3-VL-2B; LIBERO's four suites and LIBERO-PRO's eight, through the policy service. Stopped, the same command goes on.
``--dry-run`` says what it would take, and runs nothing.
"""

from __future__ import annotations

import contextlib
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

from data_utils.data_loc import LOCATION_VARIABLE
from data_utils.h5io import EpisodeWriter
from examples.libero.benchmarks import BENCHMARKS, LIBERO_SUITES
from examples.libero.model_policy import LIBERO_CAMERAS
from examples.libero.tasks import suite_tasks
from examples.libero.worklist import step_cap
from examples.recipe import CHECKPOINT, ROOT, StepFailed, Steps, in_one_line, run, steps_done, write_places

DATASETS = {
    "libero_spatial": "LiberoSpatial",
    "libero_object": "LiberoObject",
    "libero_goal": "LiberoGoal",
    "libero_10": "Libero10",
}
EVALUATED = ("libero", "libero-pro")
URI = "libero_full"
# What --dry-run reckons with: of eight demonstrations, two of each suite, recorded by one process on a CPU, images of
# both cameras (256 pixels) rendered at every step.
DEMO_STEPS, STEP_S, STEP_MB = 150, 0.1, 0.04
READY_S = 1800.0  # that loading and compiling the policy may take


@dataclass(frozen=True)
class FullConfig:
    out: Path = Path("libero_full")
    """Folder for everything; what is there already is not done again."""
    gpus: str = "0"
    """GPU indices to train on, or cpu; the first serves the policy."""
    demos: Path | None = None
    """Converted demonstrations (python -m data_utils.convert libero), a folder per suite; None: the scripted expert's
    are recorded."""
    tasks: str = "all"
    """Numbers of tasks of every suite, with commas, that are recorded and evaluated; or all."""
    episodes: int = 50
    """Demonstrations of each task to record."""
    vlm: str = "Qwen/Qwen3-VL-2B-Instruct"
    """Hugging Face name or local folder."""
    bs: int = 32
    """Samples per GPU and step."""
    va_iter: int = 30000
    """Training steps of stage 0."""
    vla_iter: int = 70000
    """Of stage 1."""
    train: str = ""
    """Further flags of both stages, as --train='--vlm-mode full --vlm-lr 1e-5 --gc'."""
    trials: int = 50
    """Episodes of each task in closed loop."""
    max_steps: str = "peers"
    """Control steps of an episode, or peers: as published evaluations have it."""
    workers: int = 16
    """Simulators that record and evaluate, and loader processes per GPU of a quarter as many."""
    image_size: int = 256
    seed: int = 0
    steps_per_s: float | None = None
    """For --dry-run: training steps per second, as the run's first lines say; None: hours of training are left open."""
    dry_run: bool = False
    """Print commands, memory, disk and hours, and run nothing."""

    def __post_init__(self) -> None:
        for name in ("episodes", "bs", "va_iter", "vla_iter", "trials", "workers"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be at least 1")
        if self.demos is not None and (missing := [suite for suite in DATASETS if not (self.demos / suite).is_dir()]):
            raise ValueError(f"--demos {self.demos} has no folder {missing[0]}; wanted one of episodes per suite")


def reproduce(config: FullConfig) -> None:
    out, steps = config.out.resolve(), Steps(4)
    demos = out / "demos" if config.demos is None else config.demos.resolve()
    steps.begin("demonstrations of the scripted expert" if config.demos is None else f"demonstrations of {demos}")
    for suite in DATASETS if config.demos is None else ():
        given = ("--suite", suite, "--tasks", config.tasks, "--episodes", str(config.episodes))
        given += ("--image_size", str(config.image_size))
        run("examples.libero.record", *given, "--workers", str(config.workers), "--out", str(demos))
    write_places(out / "data_loc.yaml", {dataset: str(demos / suite) for suite, dataset in DATASETS.items()})
    for number, (name, iterations) in enumerate(_stages(config)):
        steps.begin(f"stage {number}: {name}")
        if steps_done(_checkpoint(out, name)) < iterations:
            where = {LOCATION_VARIABLE: str(out / "data_loc.yaml")}
            run("apt.training.launch", *training(config, out, number), **where)
    steps.begin("closed loop in twelve suites")
    with served(_checkpoint(out, "vla"), config) as port:
        for benchmark in EVALUATED:
            run("examples.libero.evaluate", *evaluation(config, out, benchmark), "--controller_port", str(port))
    results = [str(out / "results" / benchmark) for benchmark in EVALUATED]
    run("examples.libero.summary", *results, "--out", str(out / "summary"))
    print(f"{out / 'summary/summary.md'} has the table; {steps.seconds:.0f} s")


def _stages(config: FullConfig) -> tuple[tuple[str, int], tuple[str, int]]:
    """Names of the runs of both stages, and their training steps."""
    return ("va", config.va_iter), ("vla", config.vla_iter)


def _checkpoint(out: Path, name: str) -> Path:
    return out / "checkpoints" / name / CHECKPOINT


def training(config: FullConfig, out: Path, stage: int) -> list[str]:
    """Arguments of a stage's training, which goes on where it stopped."""
    name, iterations = _stages(config)[stage]
    there = _checkpoint(out, name).exists()
    flags = ["train", "--config", "finetune_libero", "--gpus", config.gpus, "--stage", str(stage)]
    flags += [f"--{name}-conti" if there else f"--{name}-name", name, "--max-iter", str(iterations)]
    if stage == 1:  # a dry run has no prior to look at
        flags += ["--one-stage"] if config.dry_run else ["--va-name", "va"]
    flags += ["--vlm", config.vlm, "--bs", str(config.bs), "--seed", str(config.seed)]
    flags += ["--workers", str(max(0, config.workers // 4)), *shlex.split(config.train)]
    return [*flags, "--ckpt_dir", str(out / "checkpoints"), "--log_dir", str(out / "logs")]


def evaluation(config: FullConfig, out: Path, benchmark: str) -> list[str]:
    """Arguments of the evaluator, but for the name server's port."""
    flags = ["--benchmark", benchmark, "--model_name", "full", "--controller_name", URI, "--no-video"]
    flags += ["--num_trials_per_task", str(config.trials), "--max_steps", config.max_steps]
    flags += ["--num_workers", str(config.workers), "--image_size", str(config.image_size)]
    flags += [] if config.tasks == "all" else ["--task_ids", config.tasks]
    return [*flags, "--save_root", str(out / "results" / benchmark)]


@contextlib.contextmanager
def served(ckpt: Path, config: FullConfig) -> Iterator[int]:
    """Context in which a policy is served under ``URI``; gives its name server's port. Raises :class:`StepFailed`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    device = "cpu" if config.gpus == "cpu" else f"cuda:{config.gpus.split(',')[0]}"
    names = [sys.executable, "-m", "Pyro4.naming", "-n", "localhost", "-p", str(port)]
    service = [sys.executable, "-m", "apt.infer.remote_service", "--ckpt", str(ckpt), "--uri", URI]
    service += ["--ns-port", str(port), "--device", device, "--seed", str(config.seed)]
    with contextlib.ExitStack() as running:
        for command, name, sign in ((names, "names", "NS running"), (service, "service", "ready:")):
            log = config.out.resolve() / f"{name}.log"
            print(f"$ {shlex.join(command)} > {log} &", flush=True)
            file = running.enter_context(open(log, "w", encoding="utf-8"))
            process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)
            running.callback(_end, process)
            _wait_for(process, log, sign)
        yield port


def _wait_for(process: subprocess.Popen, log: Path, sign: str) -> None:
    deadline = time.monotonic() + READY_S
    while sign not in (said := log.read_text(encoding="utf-8")):
        if process.poll() is not None or time.monotonic() > deadline:
            last = (said.strip().splitlines() or ["it said nothing"])[-1]
            raise StepFailed(f"a process that evaluation needs did not come up: {last}; see {log}")
        time.sleep(0.2)


def _end(process: subprocess.Popen) -> None:
    process.terminate()
    try:
        process.wait(timeout=30)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def foresee(config: FullConfig) -> None:
    """Print what the run would take."""
    out = config.out.resolve()
    tasks = sum(_usable(config, suite) for suite in LIBERO_SUITES)
    episodes, lines = config.episodes * tasks, []
    if config.demos is None:
        steps = episodes * DEMO_STEPS
        hours, disk = steps * STEP_S / config.workers / 3600, steps * STEP_MB / 1024
        lines.append(f"demonstrations: {episodes} to record, {disk:.1f} GB, about {hours:.1f} h")
    for number, (_, iterations) in enumerate(_stages(config)):
        pace = config.steps_per_s
        hours = "hours unknown, give --steps-per-s" if pace is None else f"{iterations / pace / 3600:.1f} h"
        lines.append(f"stage {number}: {iterations} steps of {config.bs} samples per GPU, {hours}")
    cap = config.max_steps if config.max_steps == "peers" else int(config.max_steps)
    suites = [(suite, benchmark) for benchmark in EVALUATED for suite in BENCHMARKS[benchmark].suites]
    trials = {suite: config.trials * _usable(config, suite, benchmark) for suite, benchmark in suites}
    hours = sum(count * step_cap(suite, cap) for suite, count in trials.items()) * STEP_S / config.workers / 3600
    count = f"{sum(trials.values())} episodes in {len(trials)} suites"
    lines.append(f"closed loop: {count}, at most about {hours:.1f} h, the policy's queries not counted")
    print(*lines, f"simulators: {config.workers}; free on the disk of {out}: {_free_gb(out):.0f} GB", sep="\n")
    with tempfile.TemporaryDirectory() as folder:
        # Memory and disk of a training do not depend on how many episodes there are.
        _write_stand_in(Path(folder) / "episode.h5", config.image_size)
        write_places(Path(folder) / "data_loc.yaml", dict.fromkeys(DATASETS.values(), folder))
        for number in range(2):
            print(f"\nstage {number}, by the training itself (of one episode that stands in for all):", flush=True)
            where = {LOCATION_VARIABLE: f"{folder}/data_loc.yaml"}
            run("apt.training.launch", *training(config, out, number), "--dry-run", **where)


def _usable(config: FullConfig, suite: str, benchmark: str = "libero") -> int:
    asked = None if config.tasks == "all" else [int(number) for number in config.tasks.split(",")]
    tasks = [task for task in suite_tasks(suite, benchmark) if asked is None or task.task_id in asked]
    return sum(task.fault is None for task in tasks)


def _write_stand_in(path: Path, image_size: int) -> None:
    """An episode of LIBERO's cameras in which nothing happens."""
    image, K = np.zeros((image_size, image_size, 3), np.uint8), np.diag([image_size, image_size, 1.0])
    K[:2, 2] = image_size / 2
    with EpisodeWriter(path, list(LIBERO_CAMERAS), 1, ["wait"]) as writer:
        for step in range(32):
            writer.add_frame(
                float(step),
                np.eye(4)[None],
                np.ones(1),
                images=dict.fromkeys(LIBERO_CAMERAS, image),
                world_from_cam=dict.fromkeys(LIBERO_CAMERAS, np.eye(4)),
                K=dict.fromkeys(LIBERO_CAMERAS, K),
            )


def _free_gb(folder: Path) -> float:
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free / 1024**3


def main(argv: Sequence[str] | None = None) -> None:
    with in_one_line():
        config = tyro.cli(FullConfig, args=argv, prog="bash examples/libero/full.sh", description=__doc__)
        (foresee if config.dry_run else reproduce)(config)


if __name__ == "__main__":
    main()
