"""The files of a run: checkpoints, configuration, a table of numbers, what trackers are told."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import numpy as np

from apt.checkpoint import BEST, CheckpointError, load_checkpoint, read_config, write_config
from apt.configs import TrainConfig, TrainedConfig, train_config_from_dict
from apt.model.pretrained import Origin
from apt.training.inheritance import differing_meaning
from apt.training.trackers import Trackers, check_trackers
from data_utils.cli import check_writable
from data_utils.files import remove_leftovers
from train_utils.errors import ConfigError
from train_utils.places import LATEST
from train_utils.saving import save_checkpoint

_NOT_LEARNED = {"resume", "max_iterations", "pretrained_ckpt", "load_from_va", "device", "log_dir", "ckpt_dir",
                "report_to"}  # fmt: skip
_CONTINUE = {0: "--stage 0 --va-conti", 1: "--stage 1 --vla-conti"}


def check_run_dir(config: TrainConfig) -> None:
    """Refuse a run that would overwrite another, or resume one that is not there or that is another stage's.

    Raises:
        ConfigError: so it is.
        CheckpointError: what is to be resumed cannot be read.
        CommandLineError: a folder of the run cannot be written to.
    """
    check_trackers(config.report_to)
    latest = config.run_dir / LATEST
    if config.resume and not latest.is_file():
        raise ConfigError(f"cannot resume {config.name!r}: no {latest}; check the name, or start it without resuming")
    if not config.resume and latest.exists():
        raise ConfigError(
            f"run {config.name!r} exists at {config.run_dir}; resume it (--va-conti/--vla-conti {config.name}), "
            "choose another name, or remove the folder"
        )
    check_writable(config.run_dir, "--ckpt_dir")
    check_writable(Path(config.log_dir) / config.name, "--log_dir")
    if config.cache_vlm_features is not None:
        check_writable(Path(config.cache_vlm_features), "--cache_vlm_features")
    if config.resume:
        _check_resumed(config, latest)


def _check_resumed(config: TrainConfig, latest: Path) -> None:
    content = load_checkpoint(latest)
    stage, done = Origin.of(content).stage, content.get("current_iters")
    if stage is not None and stage != config.train_stage:
        raise ConfigError(
            f"{latest} is a stage-{stage} run's, and stage {config.train_stage} was asked to resume it; use "
            f"{_CONTINUE[stage]} {config.name}"
        )
    if isinstance(done, int) and done > config.max_iterations:  # what is no number is named where it is used
        raise ConfigError(
            f"run {config.name} is at iteration {done} already, max_iterations is {config.max_iterations}; raise it "
            "(--max-iter) to go on, or take the run as it is"
        )
    saved = _saved_fields(latest)
    if saved and (differing := differing_meaning(saved, config)):
        before, now = (", ".join(f"{field} {pair[which]}" for field, pair in differing.items()) for which in (0, 1))
        flags = " ".join(f"--{field} {value}" for field, (value, _) in differing.items())
        raise ConfigError(f"run {config.name} was trained with {before}, this would go on with {now}; give {flags}")
    if changed := _changed_rules(saved):
        raise ConfigError(
            f"run {config.name} was trained with other sampling rules ({'; '.join(changed)}): put them back to go on "
            "with it, or start a fine-tune from it"
        )
    if saved and (before := saved.get("eval_split", 0.0)) != config.eval_split:
        raise ConfigError(
            f"run {config.name} held out {before} of the episodes, this would hold out {config.eval_split}, and it may "
            f"have trained on these; give --eval_split {before}"
        )


def _changed_rules(saved: dict) -> list[str]:
    """Raises :class:`ConfigError` for rules that cannot be read."""
    trained = train_config_from_dict(saved)[0] if saved else None
    return trained.changed_rules() if isinstance(trained, TrainedConfig) else []


def _saved_fields(latest: Path) -> dict:
    """Of the run's configuration; none where there is none that can be read."""
    with contextlib.suppress(CheckpointError):
        return read_config(latest)
    return {}


def changed_since_saved(config: TrainConfig) -> list[str]:
    """What a resumed run does otherwise than before, as ``field before -> now``; how far and where it runs left out."""
    saved, now = _saved_fields(config.run_dir / LATEST), json.loads(json.dumps(config.to_dict()))
    fields = [field for field in now if field in saved and field not in {*_NOT_LEARNED, "data"}]
    return [f"{field} {saved[field]} -> {now[field]}" for field in fields if saved[field] != now[field]]


class RunDirectory:
    """Opened by the main process alone, when everything else has been built.

    Args:
        config: its ``ckpt_dir/name`` and ``log_dir/name`` are the run's folders.
    Raises:
        ConfigError: something of ``report_to`` cannot be opened.
    """

    def __init__(self, config: TrainConfig) -> None:
        self._folder = config.run_dir
        self._folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(self._folder)
        log_dir = Path(config.log_dir) / config.name
        log_dir.mkdir(parents=True, exist_ok=True)
        self._trackers = Trackers(config, log_dir)
        write_config(self._folder, config.to_dict())
        self._table = open(log_dir / "metrics.jsonl", "a", buffering=1)

    @property
    def latest(self) -> Path:
        return self._folder / LATEST

    def save(self, content: dict, numbered: bool, best: bool) -> None:
        """Write ``ckpt_latest.pt``, and ``ckpt_<iteration>.pt`` and ``ckpt_best.pt`` where asked."""
        save_checkpoint(content, self.latest)
        if numbered:
            save_checkpoint(content, self._folder / f"ckpt_{content['current_iters']:07d}.pt")
        if best:
            save_checkpoint(content, self._folder / BEST)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """To what the run reports to, and a line of ``metrics.jsonl``."""
        self._trackers.scalars(step, values)
        self._table.write(json.dumps({"step": step, **values}) + "\n")

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        """(H, W, 3) uint8 RGB to what the run reports to."""
        self._trackers.image(step, name, image)

    def close(self) -> None:
        self._trackers.close()
        self._table.close()
