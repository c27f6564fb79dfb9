"""What is done is read from the files, and cells of other settings are never mixed in."""

from __future__ import annotations

import json
import shutil
import time

import pytest
import torch

from apt.ablation.evaluation import EVALUATION_FOLDER, SETTINGS_FILE, evaluate_cell
from apt.ablation.study import Recording, StudyError, gpus_of_jobs, trained_iterations
from apt.ablation.worlds import WORLDS
from data_utils.files import read_json
from tests.ablation.helpers import finish, make_study
from train_utils.saving import save_checkpoint


def command(step) -> str:
    return " ".join(step.command("cpu"))


def test_a_shared_prior_is_trained_once_and_comes_first(tmp_path):
    study = make_study(tmp_path, "table2", seeds=1)
    steps = study.steps()
    priors = [step for step in steps if step.kind == "stage 0"]
    vlas = {step.cells[0].row.name: step for step in steps if step.kind == "stage 1"}
    assert len(priors) == 1 and len(vlas) == 4
    assert [cell.row.name for cell in priors[0].cells] == ["ki_2stage", "joint_2stage"]
    assert vlas["ki_2stage"].after is vlas["joint_2stage"].after is priors[0]
    assert vlas["ki_1stage"].after is None
    start = study.prior_folder(study.cells[2].prior) / "checkpoints/va/ckpt_latest.pt"
    assert f"--pretrained_ckpt {start} --load_from_va True" in command(vlas["joint_2stage"])
    assert "--one-stage" in command(vlas["joint_1stage"]) and "--pretrained_ckpt" not in command(vlas["joint_1stage"])


def test_a_stage_is_done_when_its_checkpoint_is_at_the_last_step_and_else_goes_on_from_it(tmp_path):
    study = make_study(tmp_path, "table2", seeds=1)
    prior, vla = study.steps()[4:6] if study.steps()[4].kind == "stage 0" else study.steps()[:2]
    assert prior.kind == "stage 0" and (prior.finished(), prior.left()) == (False, 2)
    assert "--va-name va --stage 0" in command(prior)
    latest = study.prior_folder(study.cells[2].prior) / "checkpoints/va/ckpt_latest.pt"
    latest.parent.mkdir(parents=True)
    save_checkpoint({"weights": {"w": torch.zeros(2)}, "current_iters": 1}, latest)
    assert (prior.finished(), prior.left()) == (False, 1)
    assert "--va-conti va --stage 0" in command(prior)
    save_checkpoint({"weights": {"w": torch.zeros(2)}, "current_iters": 2}, latest)
    assert prior.finished() and not vla.finished()


@pytest.mark.parametrize(
    ("changes", "names"),
    [({"max_lr": 3e-4}, "max_lr was 0.0001 and is 0.0003"), ({"data": {"episodes": 9}}, "episodes was 6 and is 9")],
)
def test_a_cell_that_was_trained_with_other_settings_is_refused_by_what_changed(tmp_path, changes, names):
    study = make_study(tmp_path, "table2")
    study.prepare()
    make_study(tmp_path, "table2", **changes).check()  # nothing is trained yet
    (study.cell_folder(study.cells[3]) / "checkpoints").mkdir()
    make_study(tmp_path, "table2").prepare()  # the same again
    with pytest.raises(StudyError, match=f"joint_2stage/seed0 was trained .*{names}") as refused:
        make_study(tmp_path, "table2", **changes).prepare()
    assert "another --out" in str(refused.value)


def test_a_trained_cell_can_be_judged_otherwise_once_its_judgement_is_removed(tmp_path):
    study = make_study(tmp_path, "table2", seeds=1)
    study.prepare()
    for part in ("checkpoints", EVALUATION_FOLDER):
        (study.cell_folder(study.cells[0]) / part).mkdir()
    other = make_study(tmp_path, "table2", seeds=1, evaluation="pickplace")
    with pytest.raises(StudyError, match="was judged .*name was 'open_loop' and is 'pickplace'.* remove evaluation"):
        other.prepare()
    (study.cell_folder(study.cells[0]) / EVALUATION_FOLDER).rmdir()
    other.prepare()


def test_a_result_of_other_settings_is_refused_by_what_differs(tmp_path):
    study = make_study(tmp_path, "table2", seeds=1)
    cell = study.cells[0]
    finish(study, cell)
    assert len(study.result(cell).values["SO/success"]) == 10 and study.result(study.cells[1]) is None
    other = make_study(tmp_path, "table2", seeds=1, max_lr=3e-4)
    with pytest.raises(StudyError, match="is of other settings: max_lr was 0.0001 and is 0.0003"):
        other.result(other.cells[0])
    study.result_path(cell).write_text('{"values": {}}')
    with pytest.raises(StudyError, match="is no cell's result .* remove it to run the cell anew"):
        study.result(cell)


def test_a_cell_whose_result_came_from_elsewhere_is_done_and_its_prior_is_not_trained_for_it(tmp_path):
    here, there = (make_study(tmp_path / name, "table2", seeds=1) for name in ("here", "there"))
    assert any(step.kind == "stage 0" for step in here.steps())
    for cell in there.cells[2:]:  # those of two stages
        finish(there, cell)
    shutil.copytree(there.results, here.results)
    assert [step.title for step in here.steps()] == [
        f"{row}/seed0 {part}" for row in ("ki_1stage", "joint_1stage") for part in ("VLA", "evaluation")
    ]


def judge(request) -> dict[str, float]:
    """A user's own evaluation."""
    return {"seed": float(request.seed), "lr": request.config["max_lr"], "episodes": request.sizes.episodes}


def test_an_own_evaluation_gets_the_cells_configuration_and_its_numbers_are_kept_with_the_settings(tmp_path):
    study = make_study(tmp_path, "table2", evaluation="tests.ablation.test_study:judge")
    study.prepare()
    cell = study.cells[-1]
    assert evaluate_cell(study.cell_folder(cell), "cpu").values == {"seed": 1.0, "lr": 1e-4, "episodes": 10}
    result = study.result(cell)
    assert result.values == {"seed": 1.0, "lr": 1e-4, "episodes": 10} and result.settings == study.settings(cell)
    assert (result.grid, result.row, result.seed, result.preset) == ("table2", "joint_2stage", 1, "debug")
    assert set(result.versions) >= {"torch", "transformers"}
    assert "place" in read_json(study.cell_folder(cell) / SETTINGS_FILE)


def judge_badly(request) -> dict[str, float]:
    return {"success": float("nan")}


def judge_by_halves(request) -> dict[str, list]:
    return {"success": [1, 0.5]}


@pytest.mark.parametrize(
    ("name", "message"),
    [("judge_badly", "success = nan; wanted a finite"), ("judge_by_halves", "success = .1, 0.5.; wanted outcomes")],
)
def test_an_evaluation_that_gives_neither_number_nor_outcomes_leaves_no_result(tmp_path, name, message):
    study = make_study(tmp_path, "table2", seeds=1, evaluation=f"tests.ablation.test_study:{name}")
    study.prepare()
    with pytest.raises(ValueError, match=message):
        evaluate_cell(study.cell_folder(study.cells[0]), "cpu")
    assert study.result(study.cells[0]) is None


def test_recording_asks_for_what_is_missing_and_refuses_to_drop_what_is_there(tmp_path):
    (train, test) = Recording(5, 2, 64, 1, WORLDS["PickPlaceCan"]).steps(tmp_path)
    assert (train.left(), test.left()) == (5, 2)
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "dataset.json").write_text(json.dumps({"settings": {}, "episodes": [{}] * 4}))
    assert train.left() == 1 and not train.finished()
    (tmp_path / "train" / "dataset.json").write_text(json.dumps({"settings": {}, "episodes": [{}] * 6}))
    with pytest.raises(StudyError, match="holds 6 episodes, and 5 are asked for"):
        train.left()


def test_gpus_are_shared_out_among_jobs():
    assert gpus_of_jobs(["0", "1", "2", "3"], 4) == ["0", "1", "2", "3"]
    assert gpus_of_jobs(["0", "1", "2", "3"], 2) == ["0,2", "1,3"]
    assert gpus_of_jobs(["0"], 3) == ["0", "0", "0"]


def test_a_broken_checkpoint_is_named(tmp_path):
    path = tmp_path / "ckpt_latest.pt"
    for content in (b"", b"no checkpoint", b"PK\x03\x04 half a one"):
        path.write_bytes(content)
        with pytest.raises(StudyError, match="ckpt_latest.pt cannot be read .* remove it"):
            trained_iterations(path)


def test_status_of_a_large_checkpoint_reads_no_tensors(tmp_path):
    path = tmp_path / "ckpt_latest.pt"
    save_checkpoint({"weights": {"w": torch.zeros(30_000_000)}, "current_iters": 7}, path)
    began = time.perf_counter()
    assert trained_iterations(path) == 7
    assert time.perf_counter() - began < 0.5
