"""What is compared: the rows of each grid, as changes to one training configuration, and the cells they expand to."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from apt.configs import TrainConfig
from apt.presets import UNIT_SCALE
from train_utils.errors import ConfigError


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Args:
        name: of its folder.
        stages: 2, a VA prior and then the VLA; 1, the VLA from fresh weights.
        columns: what the table shows of it, by column: a check mark or a blank for a bool, else the text.
        family: rows of one family differ in ``stages`` alone, and the chart and the table show the gain between them.
        changes: fields of TrainConfig.
        short: of one stage, trained as long as the second stage of the others, whatever the other 1-stage rows are.
        partner: of one stage: name of the 2-stage row that it is compared with, where its family has none.
    """

    name: str
    stages: int
    columns: Mapping[str, bool | str]
    family: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    short: bool = False
    partner: str | None = None

    @property
    def label(self) -> str:
        """For a chart's legend."""
        return f"{self.family}, {self.stages}-stage"


@dataclass(frozen=True)
class Grid:
    """Rows to compare.

    Args:
        even: 1-stage rows train as long as both stages of the others together, unless the command line says how long.
    """

    name: str
    title: str
    rows: tuple[Row, ...]
    even: bool = False


def _recipe(insulated: bool, stages: int) -> Row:
    # Robot data alone train all rows: an insulated VLM has nothing to learn from and is frozen.
    family, mode = ("KI", "frozen") if insulated else ("Ft VLM", "full")
    columns = {"KI": insulated, "2-Stage": stages == 2, "Ft VLM": not insulated}
    name = f"{'ki' if insulated else 'joint'}_{stages}stage"
    changes = {"arch": "apt", "vlm_finetune_mode": mode, "knowledge_insulation": insulated}
    return Row(name, stages, columns, family, changes)


def _claim(mode: str, stages: int, short: bool = False) -> Row:
    family = {"frozen": "VLM frozen", "full": "VLM trained"}[mode] + (", as long as the second stage" if short else "")
    columns = {"VLM": mode, "Stages": str(stages), "Samples": "of the second stage" if short else "all"}
    name = f"{'joint' if mode == 'full' else mode}_{stages}stage{'_short' if short else ''}"
    partner = f"{mode}_2stage" if short else None
    return Row(name, stages, columns, family, {"vlm_finetune_mode": mode}, short, partner)


def _architecture(arch: str, title: str, stages: int) -> Row:
    columns = {"Architecture": title, "2-Stage": stages == 2}
    return Row(f"{arch}_{stages}stage", stages, columns, title, {"arch": arch})


def _fusion(arch: str, title: str, steps: bool) -> Row:
    columns = {"Fusion": title, "Step embedding": steps}
    family = f"{title}, {'with' if steps else 'no'} step embedding"
    name = f"{arch}_{'steps' if steps else 'nosteps'}"
    return Row(name, 2, columns, family, {"arch": arch, "action_step_embedding": steps})


def _objective(objective: str, prediction: str, scale: tuple[float, ...] | None) -> Row:
    unit = "metres" if scale is None else "unit"
    columns = {"Objective": objective, "Prediction": prediction, "Scale": unit}
    # Losses of these rows cannot be compared: what they make of held-out episodes can.
    changes = {"objective": objective, "prediction": prediction, "action_scale": scale, "eval_split": 0.1}
    return Row(f"{objective}_{prediction}_{unit}", 1, columns, f"{objective}, {prediction}, {unit}", changes)


def _choice(name: str, title: str, **changes: Any) -> Row:
    return Row(name, 2, {"Other than usual": title}, title, changes)


GRIDS = {
    grid.name: grid
    for grid in (
        Grid(
            "table2",
            "Recipe: knowledge insulation, two stages, joint training of the VLM",
            tuple(_recipe(insulated, stages) for stages in (1, 2) for insulated in (True, False)),
        ),
        Grid(
            "claim",
            "A vision-action prior first and language second, or both at once",
            (
                _claim("full", 1),
                _claim("frozen", 1),
                _claim("frozen", 1, short=True),
                _claim("frozen", 2),
                _claim("full", 2),
            ),
            even=True,
        ),
        Grid(
            "architectures",
            "Action expert pretraining on three architectures",
            tuple(
                _architecture(arch, title, stages)
                for arch, title in (("pi", "π-style"), ("gr00t", "GR00T-style"), ("apt", "APT"))
                for stages in (1, 2)
            ),
        ),
        Grid(
            "fusion",
            "How VLM features enter the expert, and whether actions know their step",
            tuple(
                _fusion(arch, title, steps)
                for arch, title in (("apt", "gated"), ("token_insertion", "token insertion"))
                for steps in (True, False)
            ),
        ),
        Grid(
            "objectives",
            "What the expert predicts, and in which unit",
            tuple(
                _objective(objective, prediction, scale)
                for objective, prediction, scale in (
                    ("ddim", "epsilon", None),
                    ("ddim", "epsilon", UNIT_SCALE),
                    ("ddim", "sample", None),
                    ("ddim", "sample", UNIT_SCALE),
                    ("ddim", "v_prediction", UNIT_SCALE),
                    ("flow", "velocity", None),
                    ("flow", "velocity", UNIT_SCALE),
                    ("flow", "sample", UNIT_SCALE),
                )
            ),
        ),
        Grid(
            "choices",
            "This library's own choices, each undone alone",
            (
                _choice("usual", "nothing"),
                _choice("epsilon", "noise is predicted", prediction="epsilon"),
                _choice("metres", "actions in metres", action_scale=None),
                _choice("no_steps", "actions do not know their step", action_step_embedding=False),
                _choice("one_draw", "one noise draw per frame", noise_samples_per_obs=1),
            ),
        ),
    )
}

STAGE_1_ONLY = frozenset(
    "vlm_finetune_mode vlm_lr vlm_wd vlm_param_dtype use_gradient_checkpointing knowledge_insulation lm_loss_weight "
    "image_text_pairs image_text_bs load_from_va pretrained_ckpt".split()
)
"""Fields that stage 0, whose VLM is always frozen, does not read: cells that differ in these share their VA prior."""

BOOKKEEPING = frozenset(
    "name resume train_stage log_dir ckpt_dir device log_interval save_interval save_latest_interval vis_interval "
    "workers persistent_workers pin_memory prefetch_factor dataloader_timeout decode_threads cache_vlm_features "
    "cache_limit_gb eval_every eval_samples".split()
)
"""Fields that do not change what a run learns."""


@dataclass(frozen=True)
class Iterations:
    """Training steps: of the VA prior, of the VLA that starts from it, and of a VLA from fresh weights."""

    va: int
    vla: int
    one_stage: int


@dataclass(frozen=True)
class Prior:
    """A stage-0 run, which several cells may start from."""

    config: TrainConfig

    @property
    def settings(self) -> dict[str, Any]:
        """What its weights depend on."""
        return {"train": learned_fields(self.config)}


@dataclass(frozen=True, eq=False)
class Cell:
    """A row and a seed.

    Args:
        config: of its stage 1, without the checkpoint it starts from.
        prior: None: it starts from fresh weights.
    """

    row: Row
    seed: int
    config: TrainConfig
    prior: Prior | None

    @property
    def name(self) -> str:
        return f"{self.row.name}/seed{self.seed}"

    @property
    def settings(self) -> dict[str, Any]:
        """What its weights depend on, as plain data."""
        prior = None if self.prior is None else self.prior.settings["train"]
        return {"train": learned_fields(self.config), "va_prior": prior}


def select_rows(grid: Grid, names: Sequence[str] | None) -> Grid:
    """The grid with the rows of these names; None: all. Raises ``ValueError``."""
    if names is None:
        return grid
    known = [row.name for row in grid.rows]
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"--rows: grid {grid.name} has no row {', '.join(unknown)}; it has {', '.join(known)}")
    return dataclasses.replace(grid, rows=tuple(row for row in grid.rows if row.name in names))


def expand(grid: Grid, base: TrainConfig, seeds: int, iterations: Iterations) -> list[Cell]:
    """The cells of a grid, seed by seed.

    Args:
        base: what all rows have in common; a row's own changes go over it.
    Raises:
        ConfigError: a row that cannot be configured, with its name.
    """
    cells = []
    for seed in range(seeds):
        for row in grid.rows:
            try:
                cells.append(_cell(row, base, seed, iterations))
            except (ConfigError, TypeError) as error:  # TypeError: a field that TrainConfig does not have
                raise ConfigError(f"grid {grid.name}, row {row.name}: {error}") from error
    return cells


def _cell(row: Row, base: TrainConfig, seed: int, iterations: Iterations) -> Cell:
    steps = iterations.vla if row.stages == 2 or row.short else iterations.one_stage
    config = dataclasses.replace(base, **row.changes, train_stage=1, seed=seed, max_iterations=steps)
    if row.stages == 1:
        return Cell(row, seed, config, None)
    defaults = {f.name: f.default for f in dataclasses.fields(TrainConfig) if f.name in STAGE_1_ONLY}
    prior = dataclasses.replace(config, **defaults, train_stage=0, max_iterations=iterations.va)
    return Cell(row, seed, config, Prior(prior))


def learned_fields(config: TrainConfig) -> dict[str, Any]:
    """The fields that change what a run learns, as JSON gives them back."""
    kept = {name: value for name, value in config.to_dict().items() if name not in BOOKKEEPING}
    return json.loads(json.dumps(kept))


def digest(settings: Mapping[str, Any]) -> str:
    """The same for the same settings."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def files_digest(folder: Path) -> str:
    """The same for the same file names and sizes below ``folder``, hidden ones left out."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    return digest({str(path.relative_to(folder)): path.stat().st_size for path in files})
