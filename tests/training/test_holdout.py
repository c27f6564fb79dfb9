"""Held-out episodes: chosen by name, never trained on, evaluated alike every time, and what decides the best policy."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from apt.checkpoint import load_checkpoint
from apt.training import trainer
from apt.training.holdout import spread
from data_utils.data_loc import Location
from data_utils.datasets import PickPlaceCan
from data_utils.samples.split import is_held_out, split
from tests.synthetic import write_episode
from tests.training.helpers import start_training, train

# Of the six episodes of the fixture; their files' names decide.
SHARE = 0.4
VALUES = {"loss", "translation", "rotation", "gripper", "position_cm", "rotation_deg", "gripper_wrong"}
SHORT = {"eval_split": SHARE, "eval_samples": 6, "max_iterations": 3}


def evaluations(folder: Path, name: str) -> dict[int, dict[str, float]]:
    rows = map(json.loads, (folder / "log" / name / "metrics.jsonl").read_text().splitlines())
    return {
        row["step"]: {tag.removeprefix("eval/"): value for tag, value in row.items() if tag != "step"}
        for row in rows
        if "eval/loss" in row
    }


def weights(folder: Path, name: str, file: str = "ckpt_latest.pt") -> dict[str, torch.Tensor]:
    return load_checkpoint(folder / "ckpt" / name / file)["weights"]


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(first[name], second[name]) for name in second)


# -- which episodes ----------------------------------------------------------------------------------------------------


def test_an_episode_is_held_out_by_its_name_below_its_location_alone(tmp_path):
    for place in ("here", "there"):
        for name in ("a/ep0.h5", "a/ep1.h5", "b/ep0.h5", "b/ep1.h5", "ep2.h5", "ep3.h5"):
            path = tmp_path / place / name
            path.parent.mkdir(parents=True, exist_ok=True)
            write_episode(path, 0)

    def names(place: str, dataset: PickPlaceCan) -> set[str]:
        return {str(Path(path).relative_to(tmp_path / place)) for path in dataset.paths}

    (here_rest,), (here,) = split([PickPlaceCan([Location(str(tmp_path / "here"))])], 0.5)
    assert names("here", here) == {name for name in names("here", here) if is_held_out(name, 0.5)}
    assert not any(is_held_out(name, 0.5) for name in names("here", here_rest))
    assert len(here) + len(here_rest) == 6 and not here.train and here_rest.train
    (tmp_path / "there/ep2.h5").unlink()  # what else there is does not matter
    _, (there,) = split([PickPlaceCan([Location(str(tmp_path / "there"))])], 0.5)
    assert names("there", there) == names("here", here) - {"ep2.h5"}
    sample = here.sample(0, np.random.default_rng(0), 2)
    assert sample.source.startswith(here.paths[0]) and here.lengths[0] == len(here.episode(0))


def test_shares_hold_roughly_and_larger_ones_hold_out_the_same_and_more():
    names = [f"task_{index % 7}/episode_{index:06d}.h5" for index in range(5000)]
    few, many = ({name for name in names if is_held_out(name, share)} for share in (0.05, 0.2))
    assert few < many and 0.03 < len(few) / 5000 < 0.07 and 0.18 < len(many) / 5000 < 0.22
    assert not any(is_held_out(name, 0.0) for name in names)


def test_a_share_that_leaves_nothing_on_one_side_is_refused_in_one_line(tmp_path, located, capsys):
    for share, named in ((1e-9, "eval_split 1e-09 holds out none of 6 episodes"), (0.9999, "holds out all 6 episodes")):
        assert train(tmp_path, "run", eval_split=share) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert named in line
    assert train(tmp_path, "run", eval_split=1.0) == 2
    assert "eval_split is 1.0; wanted 0 (none) to below 1" in capsys.readouterr().err


def test_frames_are_spread_over_episodes_and_their_lengths(located):
    datasets = [PickPlaceCan(train=False), PickPlaceCan(train=False)]
    for count in (1, 5, 12, 40):
        keys = spread(datasets, count)
        assert len(keys) == count and keys == spread(datasets, count)
        visits = np.bincount([6 * key.dataset + key.episode for key in keys], minlength=12)
        assert visits.max() - visits.min() <= 1
        shares = [key.frame / datasets[key.dataset].episode_length(key.episode) for key in keys]
        assert 0 <= min(shares) and max(shares) < 1
    assert np.histogram(shares, 4, (0, 1))[0].min() >= 40 / 4 / 2


# -- runs --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory, data_loc) -> Path:
    """Runs that differ in how often they evaluate alone, with averaged weights."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("APT_DATA_LOC", str(data_loc))
        fields = {**SHORT, "ema_enabled": True, "ema_start": 0, "save_latest_interval": 100, "save_interval": 100}
        for name, every in (("often", 1), ("once", 0)):
            assert train(folder, name, eval_every=every, **fields) == 0
        patch.setattr(trainer.Holdout, "is_due", lambda holdout, iteration: False)
        assert train(folder, "never", eval_every=1, **fields) == 0
    return folder


def test_evaluations_change_nothing_that_a_run_learns(runs):
    for name in ("often", "once"):
        assert same(weights(runs, name), weights(runs, "never"))
        mine, wanted = (load_checkpoint(runs / "ckpt" / run / "ckpt_latest.pt") for run in (name, "never"))
        assert all(map(torch.equal, mine["ema"]["shadow_params"], wanted["ema"]["shadow_params"]))


def test_numbers_come_when_they_are_due_and_are_the_same_for_the_same_weights(runs):
    often, once = evaluations(runs, "often"), evaluations(runs, "once")
    assert list(often) == [1, 2, 3] and list(once) == [3] and evaluations(runs, "never") == {}
    assert often[3] == once[3] and set(once[3]) == VALUES
    assert all(math.isfinite(value) for values in often.values() for value in values.values())
    assert len({values["loss"] for values in often.values()}) == 3
    assert 0 <= once[3]["gripper_wrong"] <= 1 and 0 < once[3]["position_cm"] < 1000
    total = 30 * once[3]["translation"] + 10 * once[3]["rotation"] + 10 * once[3]["gripper"]
    assert total == pytest.approx(once[3]["loss"], rel=1e-5)


def test_held_out_episodes_are_not_trained_on(tmp_path, located, monkeypatch):
    seen: set[str] = set()
    step = trainer.Trainer._step

    def watched(self):
        batch = step(self)
        seen.update(Path(source.rsplit(" frame ", 1)[0]).name for source in batch.source)
        return batch

    monkeypatch.setattr(trainer.Trainer, "_step", watched)
    assert train(tmp_path, "run", **{**SHORT, "eval_every": 0, "max_iterations": 12}) == 0
    held_out = {f"ep{index:03d}.h5" for index in range(6) if is_held_out(f"ep{index:03d}.h5", SHARE)}
    assert 0 < len(held_out) < 6
    assert seen == {f"ep{index:03d}.h5" for index in range(6)} - held_out


def test_the_held_out_loss_decides_which_checkpoint_is_the_best(tmp_path, located, monkeypatch, capsys):
    losses = iter([3.0, 5.0, 2.0, 4.0])
    evaluate = trainer.Holdout.evaluate
    monkeypatch.setattr(
        trainer.Holdout, "evaluate", lambda holdout, model: {**evaluate(holdout, model), "loss": next(losses)}
    )
    fields = {**SHORT, "max_iterations": 4, "eval_every": 1, "save_latest_interval": 100, "save_interval": 1}
    assert train(tmp_path, "run", **fields) == 0
    best = load_checkpoint(tmp_path / "ckpt/run/ckpt_best.pt")
    assert (best["current_iters"], best["best_score"], best["latest_score"]) == (3, 2.0, 2.0)
    assert load_checkpoint(tmp_path / "ckpt/run/ckpt_latest.pt")["best_score"] == 2.0
    lines = [line for line in capsys.readouterr().out.splitlines() if " held out: loss" in line]
    assert [line.endswith("(best)") for line in lines] == [True, False, True, False]
    assert re.search(r"4/4 held out: loss 4\.000 \(trans .* rot .* grip .*\) position .* cm rotation .* deg", lines[3])


def test_a_resumed_run_goes_on_with_its_score_and_keeps_its_share(tmp_path, located, capsys):
    fields = {**SHORT, "eval_every": 1}
    assert train(tmp_path, "whole", **{**fields, "max_iterations": 4}) == 0
    assert train(tmp_path, "run", **{**fields, "max_iterations": 2}) == 0
    for share in (0.0, 0.5):
        assert train(tmp_path, "run", **{**fields, "max_iterations": 4, "eval_split": share}, resume=True) == 2
        assert "run run held out 0.4 of the episodes" in capsys.readouterr().err
    assert train(tmp_path, "run", **{**fields, "max_iterations": 4}, resume=True) == 0
    assert evaluations(tmp_path, "run") == evaluations(tmp_path, "whole")
    assert same(weights(tmp_path, "run"), weights(tmp_path, "whole"))
    scores = [load_checkpoint(tmp_path / "ckpt" / run / "ckpt_latest.pt")["best_score"] for run in ("run", "whole")]
    assert scores[0] == scores[1] == min(values["loss"] for values in evaluations(tmp_path, "whole").values())


@pytest.mark.parametrize(
    "fields",
    [
        {"objective": "flow", "arch": "pi", "vlm_finetune_mode": "lora"},
        {"vlm_finetune_mode": "full", "lm_loss_weight": 0.1, "noise_samples_per_obs": 2},
        {"augment": False, "cache_vlm_features": "features"},
        {"train_stage": 0, "workers": 1},
    ],
    ids=str,
)
def test_every_kind_of_run_can_be_evaluated(tmp_path, located, monkeypatch, fields):
    monkeypatch.chdir(tmp_path)
    assert train(tmp_path, "run", **SHORT, eval_every=2, **fields) == 0
    assert list(evaluations(tmp_path, "run")) == [2, 3]


def test_the_dry_run_counts_what_is_left(tmp_path, located, capsys):
    from apt.train import main
    from tests.training.helpers import flags

    assert main([*flags(tmp_path, "run", **SHORT), "--dry-run"]) == 0
    held_out = sum(is_held_out(f"ep{index:03d}.h5", SHARE) for index in range(6))
    said = capsys.readouterr().out
    assert f"{6 - held_out} episodes" in said and f"; {held_out} episodes held out" in said


def test_two_processes_see_the_frames_of_one(tmp_path, data_loc):
    processes = start_training(tmp_path, "two", data_loc, 2, **SHORT, eval_every=0)
    out, err = processes.communicate(timeout=180)
    assert processes.returncode == 0, err
    assert "held out: 6 frames of" in out
    (values,) = evaluations(tmp_path, "two").values()
    assert set(values) == VALUES and all(math.isfinite(value) for value in values.values())


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_a_sharded_policy_is_evaluated_by_all_its_processes(tmp_path, data_loc, stage):
    pytest.importorskip("deepspeed")
    fields = {**SHORT, "eval_every": 2, "vlm_finetune_mode": "full"}
    process = start_training(tmp_path, "zero", data_loc, 2, backend="deepspeed", ds_zero=stage, **fields)
    plain = start_training(tmp_path, "ddp", data_loc, 2, **fields)
    for started in (process, plain):
        _, err = started.communicate(timeout=300)
        assert started.returncode == 0, err
    sharded, whole = evaluations(tmp_path, "zero"), evaluations(tmp_path, "ddp")
    assert list(sharded) == [2, 3] == list(whole)
    assert sharded[2]["loss"] == pytest.approx(whole[2]["loss"], rel=1e-3)
