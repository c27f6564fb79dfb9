"""Where an ablation's files are, what each step of a cell runs, and what is done: all of it read from the files."""

from __future__ import annotations

import dataclasses
import pickle
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from apt.ablation.evaluation import EVALUATION_FOLDER, SETTINGS_FILE, EvaluationSizes
from apt.ablation.grid import Cell, Grid, Prior, digest
from apt.ablation.results import CellResult, result_path
from apt.ablation.worlds import World
from apt.configs import TrainConfig
from apt.presets import CONFIGS
from data_utils.files import read_json, write_json, write_text
from train_utils.places import LATEST

KINDS = ("record", "stage 0", "stage 1", "evaluation")
LOG_FILE, FAILED_FILE = "log.txt", "failed.json"
_CHECKPOINTS, _LOGS = "checkpoints", "logs"
_OWN_FIELDS = ("name", "ckpt_dir", "log_dir", "train_stage", "device", "resume")  # the study gives these itself


class StudyError(ValueError):
    """Files of another study, or of one with other settings; the message says what to do."""


@dataclass(eq=False)
class Step:
    """A command to run, once those it comes after are done.

    Args:
        title: for a person.
        kind: of work, for estimates; amount: of it in all, in the kind's own unit.
        command: for the indices of a job's GPUs, e.g. ``"0"``, or ``"cpu"``.
        log: file its output is appended to.
        finished: whether its files say so.
        left: of ``amount``.
        cells: that it is part of.
        picks_gpus: the command chooses among all GPUs by their indices; else it is shown its own alone.
    """

    title: str
    kind: str
    amount: float
    command: Callable[[str], list[str]]
    log: Path
    finished: Callable[[], bool]
    left: Callable[[], float]
    cells: list[Cell] = field(default_factory=list)
    after: Step | None = None
    picks_gpus: bool = False


@dataclass(frozen=True)
class Recording:
    """Demonstrations that are recorded when they are not there yet.

    Args:
        train_flags: of the program that records, for those to train on alone.
    """

    episodes: int
    test_episodes: int
    image_size: int
    workers: int
    world: World
    seed: int = 0
    train_flags: tuple[str, ...] = ()

    @property
    def settings(self) -> dict[str, Any]:
        """What the episodes depend on, as JSON gives it back."""
        values = {name: value for name, value in vars(self).items() if name not in ("workers", "world", "train_flags")}
        if self.train_flags:
            values["train_flags"] = list(self.train_flags)
        return {**values, "record": self.world.record, "flags": list(self.world.flags)}

    def steps(self, demos: Path) -> list[Step]:
        """Held-out episodes come from other seeds."""
        parts = (
            ("train", self.episodes, self.seed, self.train_flags),
            ("test", self.test_episodes, self.seed + 1000, ()),
        )
        return [self._step(demos / part, count, seed, flags) for part, count, seed, flags in parts]

    def _step(self, folder: Path, count: int, seed: int, flags: Sequence[str]) -> Step:
        command = [sys.executable, "-m", self.world.record, "--out", str(folder), "--episodes", str(count)]
        command += ["--seed", str(seed), "--image-size", str(self.image_size)]
        command += ["--workers", str(self.workers), *self.world.flags, *flags]

        def left() -> int:
            path = folder / "dataset.json"
            recorded = len(read_json(path)["episodes"]) if path.is_file() else 0
            if recorded > count:
                raise StudyError(
                    f"{folder} holds {recorded} episodes, and {count} are asked for; ask for as many, or give another "
                    "--out"
                )
            return count - recorded

        title = f"record {count} episodes for {folder.name}"
        return Step(title, "record", count, lambda _: command, folder.parent / LOG_FILE, lambda: left() == 0, left)


@dataclass(frozen=True)
class Study:
    """A grid of cells under a folder.

    Args:
        out: absolute.
        preset: name of the configuration that the cells' differ from.
        data: what identifies the demonstrations; demos: their folder, None: the user's own data locations.
        evaluation: its name.
        results: absolute; where the cells' results lie, of this study and others. A cell whose result is there is done,
            wherever it ran.
    """

    out: Path
    grid: Grid
    cells: list[Cell]
    preset: str
    data: Mapping[str, Any]
    demos: Path | None
    evaluation: str
    sizes: EvaluationSizes
    results: Path

    @property
    def folder(self) -> Path:
        """Of the grid."""
        return self.out / self.grid.name

    def cell_folder(self, cell: Cell) -> Path:
        return self.folder / cell.name

    def prior_folder(self, prior: Prior) -> Path:
        settings = {name: value for name, value in prior.settings["train"].items() if name != "seed"}
        name = f"{prior.config.arch}_{digest({'train': settings, 'data': self.data})[:10]}"
        return self.out / "stage0" / name / f"seed{prior.config.seed}"

    # -- status ----------------------------------------------------------------------------------------------------

    def settings(self, cell: Cell) -> dict[str, Any]:
        """What the cell's numbers depend on."""
        evaluation = {"name": self.evaluation, "sizes": dataclasses.asdict(self.sizes)}
        return {"learned": {**cell.settings, "data": dict(self.data)}, "evaluation": evaluation}

    def check(self) -> None:
        """Raises ``StudyError`` where the folder holds cells that were trained or judged with other settings."""
        for cell in self.cells:
            folder = self.cell_folder(cell)
            if self.result(cell) is not None:
                continue
            trained, judged = (folder / _CHECKPOINTS).exists(), (folder / EVALUATION_FOLDER).exists()
            if not trained or not (folder / SETTINGS_FILE).is_file():
                continue
            kept, wanted = read_json(folder / SETTINGS_FILE), self.settings(cell)
            if differing := _differences(kept.get("learned"), wanted["learned"]):
                what, remedy = "trained", f"remove {folder}"
            elif judged and (differing := _differences(kept.get("evaluation"), wanted["evaluation"])):
                what, remedy = "judged", f"remove {EVALUATION_FOLDER} there to judge its checkpoint anew"
            else:
                continue
            raise StudyError(
                f"{folder} was {what} with other settings: {'; '.join(differing)}. Give the same, or another --out, or "
                f"{remedy}"
            )

    def result_path(self, cell: Cell) -> Path:
        return result_path(self.results, self.grid.name, cell.row.name, cell.seed)

    def result(self, cell: Cell) -> CellResult | None:
        """What the cell came to; None: not there yet. Raises ``StudyError`` for a result of other settings."""
        path = self.result_path(cell)
        if not path.is_file():
            return None
        try:
            result = CellResult.read(path)
        except ValueError as error:
            raise StudyError(str(error)) from error
        if differing := _differences(result.settings, self.settings(cell)):
            raise StudyError(
                f"{path} is of other settings: {'; '.join(differing)}. Give the same, or another --results, or remove "
                "the file to run the cell anew"
            )
        return result

    def failure(self, cell: Cell) -> str | None:
        """What the cell's last run said when it failed; None: it did not."""
        path = self.cell_folder(cell) / FAILED_FILE
        return read_json(path)["message"] if path.is_file() else None

    def note_failure(self, cell: Cell, message: str | None) -> None:
        """None: forget it."""
        path = self.cell_folder(cell) / FAILED_FILE
        if message is not None:
            write_json(path, {"message": message})
        else:
            path.unlink(missing_ok=True)

    # -- steps -----------------------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Folders, settings and the data's location, before anything runs."""
        self.check()
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.demos is not None:
            text = f'default:\n  {self.cells[0].config.dataset_classes[0]}: "{self.demos / "train"}"\n'
            write_text(self.data_location, text)
        for cell in self.cells:
            folder = self.cell_folder(cell)
            folder.mkdir(parents=True, exist_ok=True)
            place = {
                "grid": self.grid.name,
                "row": cell.row.name,
                "preset": self.preset,
                "demos": None if self.demos is None else str(self.demos),
                "checkpoint": str(Path(_CHECKPOINTS) / "vla" / LATEST),
                "metrics": str(Path(_LOGS) / "vla" / "metrics.jsonl"),
                "results": str(self.results),
            }
            write_json(folder / SETTINGS_FILE, {**self.settings(cell), "place": place})

    @property
    def data_location(self) -> Path:
        return self.folder / "data_loc.yaml"

    def steps(self, cells: Sequence[Cell] | None = None) -> list[Step]:
        """Of ``cells``, all if None, that have no result, in an order that finishes cells early; a prior that several
        start from is there once."""
        steps: list[Step] = []
        priors: dict[Path, Step] = {}
        for cell in self.cells if cells is None else cells:
            if self.result(cell) is not None:
                continue
            first = None
            if cell.prior is not None:
                folder = self.prior_folder(cell.prior)
                if folder not in priors:
                    priors[folder] = self._training(f"{cell.name} VA prior", cell.prior.config, folder, None)
                    steps.append(priors[folder])
                first = priors[folder]
                first.cells.append(cell)
            folder = self.cell_folder(cell)
            start = None if cell.prior is None else _latest(self.prior_folder(cell.prior), "va")
            vla = self._training(f"{cell.name} VLA", cell.config, folder, start)
            vla.after = first
            steps += [vla, self._judging(cell, vla)]
            vla.cells.append(cell)
        return steps

    def _training(self, title: str, config: TrainConfig, folder: Path, start: Path | None) -> Step:
        name = ("va", "vla")[config.train_stage]
        latest = _latest(folder, name)

        def command(gpus: str) -> list[str]:
            resumes = latest.is_file()
            run = [f"--{name}-{'conti' if resumes else 'name'}", name, "--stage", str(config.train_stage)]
            if start is not None:
                run += ["--pretrained_ckpt", str(start), "--load_from_va", "True"]
            elif config.train_stage == 1:
                run.append("--one-stage")
            places = ["--ckpt_dir", str(folder / _CHECKPOINTS), "--log_dir", str(folder / _LOGS)]
            fields = changed_fields(config, CONFIGS[self.preset])
            own = ["--config", self.preset, "--gpus", gpus, *run, *places]
            return [sys.executable, "-m", "apt.training.launch", "train", *own, *fields]

        def left() -> int:
            return config.max_iterations - trained_iterations(latest)

        kind = f"stage {config.train_stage}"
        log, amount = folder / LOG_FILE, config.max_iterations
        return Step(title, kind, amount, command, log, lambda: left() <= 0, left, picks_gpus=True)

    def _judging(self, cell: Cell, after: Step) -> Step:
        folder = self.cell_folder(cell)

        def command(gpus: str) -> list[str]:
            device = "cpu" if gpus.startswith("cpu") else "cuda"
            return [sys.executable, "-m", "apt.ablation.evaluation", str(folder), "--device", device]

        def finished() -> bool:
            return self.result(cell) is not None

        title = f"{cell.name} evaluation"
        return Step(title, "evaluation", 1, command, folder / LOG_FILE, finished, lambda: 1 - finished(), [cell], after)


def _latest(folder: Path, run: str) -> Path:
    return folder / _CHECKPOINTS / run / LATEST


def trained_iterations(checkpoint: Path) -> int:
    """How far a run is; 0 before its first checkpoint. The tensors are not read. Raises ``StudyError``."""
    if not checkpoint.is_file():
        return 0
    import torch  # slow, and needed here alone

    try:
        return int(torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)["current_iters"])
    except (RuntimeError, OSError, KeyError, TypeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        raise StudyError(f"{checkpoint} cannot be read ({error}); remove it to train that stage anew") from error


def changed_fields(config: TrainConfig, preset: TrainConfig) -> list[str]:
    """The command line's ``--field value ...`` that make ``config`` of ``preset``."""
    arguments = []
    for name in (item.name for item in dataclasses.fields(TrainConfig)):
        value = getattr(config, name)
        if name in _OWN_FIELDS or value == getattr(preset, name):
            continue
        arguments.append(f"--{name}")
        arguments += [*map(str, value)] if isinstance(value, tuple) else [str(value)]
    return arguments


def _differences(found: Any, wanted: Any, where: str = "") -> list[str]:
    if isinstance(found, dict) and isinstance(wanted, dict):
        keys = sorted(found.keys() | wanted.keys())
        pairs = ((key, found.get(key), wanted.get(key)) for key in keys)
        return [text for key, a, b in pairs for text in _differences(a, b, key)]
    return [] if found == wanted else [f"{where} was {found!r} and is {wanted!r}"]


def gpus_of_jobs(gpus: Sequence[str], jobs: int) -> list[str]:
    """GPU indices of each of ``jobs`` jobs: several each, or one that several share."""
    if len(gpus) >= jobs:
        return [",".join(gpus[job::jobs]) for job in range(jobs)]
    return [gpus[job % len(gpus)] for job in range(jobs)]
