"""Every architecture and objective through the commands: trained, checked offline, planned with."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from apt.checkpoint import load_checkpoint
from apt.infer.planner import TrajPlanner
from apt.model.experts.registry import ARCHITECTURES
from benchmarks import architectures
from data_utils.datasets import PickPlaceCan
from scripts import test_ckpt as offline_check
from tests.infer.helpers import frame_at
from tests.model.test_architectures import KINDS, Kind
from tests.training.helpers import losses, train

# The default suite trains every architecture with the objective of its paper.
PARAMS = [
    pytest.param(kind, marks=pytest.mark.slow if kind.objective == "ddim" else (), id=str(kind)) for kind in KINDS
]


@pytest.fixture(scope="module", params=PARAMS)
def trained(request, tmp_path_factory, data_loc) -> tuple[Kind, Path]:
    """A folder with the run ``vla`` of one step, and under flow matching the prior ``va`` that it expands."""
    kind, folder = request.param, tmp_path_factory.mktemp("runs")
    fields = {"arch": kind.arch, "objective": kind.objective, "max_iterations": 1, "ema_enabled": True, "ema_start": 0}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("APT_DATA_LOC", str(data_loc))
        if kind.objective == "flow":
            assert train(folder, "va", train_stage=0, **fields) == 0
            fields |= {"pretrained_ckpt": "va", "load_from_va": True}
        assert train(folder, "vla", **fields) == 0
    return kind, folder


def checkpoint(folder: Path, run: str) -> Path:
    return folder / "ckpt" / run / "ckpt_latest.pt"


def test_a_run_trains_says_what_it_is_and_fits_the_offline_check(trained, capsys):
    kind, folder = trained
    assert np.isfinite(losses(folder, "vla")[1])
    content = load_checkpoint(checkpoint(folder, "vla"))
    assert (content["arch"], content["train_stage"]) == (kind.arch, 1)

    def check(run: str, *flags: str) -> tuple[int, str, str]:
        return offline_check.main(["--ckpt", str(checkpoint(folder, run)), *flags]), *capsys.readouterr()

    code, said, _ = check("vla", "--train-stage", "1")
    assert code == 0 and f"arch {kind.arch}, stage 1, depth 4 (4 blocks), 192 wide (tiny)" in said
    assert f"copied     {len(content['weights'])}\nfresh      0\ndropped    0" in said
    code, _, complaint = check("vla", "--train-stage", "1", "--model", "small")
    assert code == 2 and "tensors differ in shape" in complaint
    if kind.objective == "flow":
        code, _, complaint = check("va", "--train-stage", "1")
        assert code == 2 and "--load-from-va" in complaint
        code, said, _ = check("va", "--train-stage", "1", "--load-from-va")
        assert code == 0 and "stage 0" in said and "dropped    0" in said


def test_a_planner_plans_with_a_run(trained, located):
    kind, folder = trained
    config = dataclasses.replace(PickPlaceCan.config, image_hw=(64, 64))
    frame = frame_at(PickPlaceCan(config=config, train=False), 0, 3)
    planner = TrajPlanner(checkpoint(folder, "vla"), ensemble=0, use_ema=kind.arch != "gr00t", device="cpu")
    assert planner.policy.model.config.arch == kind.arch
    assert planner.policy.samplers == {"ddim": ("ddim", "dpm"), "flow": ("euler",)}[kind.objective]
    planner.set_prompt("reach for the red square")
    planner.add_obs_frame(frame)
    for sampler in (None, *planner.policy.samplers):
        poses, grippers, times, _ = planner.get_action(2, steps=2, sampler=sampler)
        assert poses.shape == (2, 32, 1, 4, 4) and np.isfinite(poses).all() and np.isfinite(grippers).all()
        np.testing.assert_allclose(times, 3 + np.arange(1, 33))
    with pytest.raises(ValueError, match="is not one of the objective"):
        planner.get_action(sampler={"ddim": "euler", "flow": "dpm"}[kind.objective])


@pytest.mark.parametrize("trained", [Kind("pi", "flow")], ids=str, indirect=True)
def test_another_architecture_or_stage_is_refused_by_the_trainer_in_one_line(trained, located, capsys):
    kind, folder = trained
    other = "gr00t" if kind.arch != "gr00t" else "pi"
    start = {"pretrained_ckpt": "vla", "max_iterations": 1, "objective": kind.objective}
    for fields, named in (
        ({"arch": other}, f"of a policy with arch {kind.arch}, this run's has arch {other}; give --arch {kind.arch}"),
        ({"arch": kind.arch, "load_from_va": True}, "it is a VLA already"),
        ({"arch": kind.arch, "train_stage": 0}, "it is a stage-1 checkpoint, a stage-0 one is wanted"),
    ):
        assert train(folder, "refused", **start, **fields) == 2
        complaint = capsys.readouterr().err.strip().splitlines()
        assert len(complaint) == 1 and named in complaint[0]


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["pi", "gr00t", "token_insertion"])
def test_a_run_that_is_resumed_and_draws_pictures_goes_on(arch, tmp_path, located):
    """Without gates there is no picture of them."""
    fields = {"arch": arch, "objective": "flow", "vis_interval": 2, "vlm_finetune_mode": "lora"}
    assert train(tmp_path, "run", max_iterations=2, **fields) == 0
    assert train(tmp_path, "run", max_iterations=4, resume=True, **fields) == 0
    assert train(tmp_path, "whole", max_iterations=4, **fields) == 0
    first, second = (load_checkpoint(checkpoint(tmp_path, name))["weights"] for name in ("run", "whole"))
    assert all(torch.equal(first[name], second[name]) for name in second)


@pytest.mark.slow
def test_the_benchmark_measures_every_architecture_against_apt(capsys):
    architectures.main("--vlm tiny --bs 1 --repeat 1 --steps 2 --device cpu".split())
    lines = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    head, *rows = ([cell.strip() for cell in line] for line in lines)
    assert [row[0] for row in rows] == list(ARCHITECTURES) and all(len(row) == len(head) for row in rows)
    ratios = [index for index, cell in enumerate(head) if cell == "ratio"]
    assert len(ratios) == 4
    assert all(rows[0][index] == "1" and row[index].endswith("x apt") for index in ratios for row in rows[1:])
    assert all(float(row[head.index("train GFLOP")]) > float(row[head.index("of them expert")]) > 0 for row in rows)
