"""A run that is interrupted continues as if it had not been."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time

import pytest
import torch

from apt.checkpoint import load_checkpoint
from tests.training.helpers import losses, start_training, train
from train_utils.backend import DDPBackend
from train_utils.optimizer_shards import check_partitions
from train_utils.places import LATEST
from train_utils.saving import save_checkpoint


def weights(folder, name) -> dict[str, torch.Tensor]:
    return load_checkpoint(folder / "ckpt" / name / "ckpt_latest.pt")["weights"]


@pytest.mark.parametrize("stage, mode, workers", [(0, "frozen", 0), (1, "full", 2)])
def test_a_resumed_run_repeats_the_uninterrupted_one_to_the_bit(tmp_path, located, stage, mode, workers):
    common = {
        "train_stage": stage, "vlm_finetune_mode": mode, "workers": workers, "camera_view_dropout": 0.5,
        "robot_pose_aug": True, "ema_enabled": True, "ema_start": 2, "gradient_accumulation_steps": 2,
    }  # fmt: skip
    # 6 episodes x 3 rounds = 9 batches of 2 per epoch: iteration 3 is in mid-epoch, iteration 7 in the next one.
    assert train(tmp_path, "whole", max_iterations=8, **common) == 0
    assert train(tmp_path, "parts", max_iterations=3, **common) == 0
    assert train(tmp_path, "parts", max_iterations=8, resume=True, **common) == 0
    assert losses(tmp_path, "parts") == losses(tmp_path, "whole")
    whole, parts = (load_checkpoint(tmp_path / "ckpt" / name / "ckpt_latest.pt") for name in ("whole", "parts"))
    for key in ("weights", "vlm_weights"):
        for name, tensor in whole.get(key, {}).items():
            assert torch.equal(tensor, parts[key][name]), name
    for one, other in zip(whole["ema"]["shadow_params"], parts["ema"]["shadow_params"], strict=True):
        assert torch.equal(one, other)


def test_a_run_whose_data_have_changed_begins_a_new_epoch(tmp_path, monkeypatch, episode_dir, capsys):
    data = tmp_path / "data"
    shutil.copytree(episode_dir, data)
    location = tmp_path / "loc.yaml"
    location.write_text(f"default:\n  PickPlaceCan: {data}\n")
    monkeypatch.setenv("APT_DATA_LOC", str(location))
    assert train(tmp_path, "run", max_iterations=7, sample_multiplex=3) == 0  # of 9 batches per epoch
    next(data.glob("*.h5")).unlink()
    next(data.glob("*.h5")).unlink()
    assert train(tmp_path, "run", max_iterations=9, sample_multiplex=3, resume=True) == 0
    said = capsys.readouterr().out
    assert "the data have changed: 12 samples per epoch, 18 before; a new epoch begins" in said and "9/9" in said


def test_the_number_of_workers_does_not_change_the_run(tmp_path, located):
    for workers in (0, 2):
        assert train(tmp_path, f"w{workers}", max_iterations=4, workers=workers) == 0
    assert losses(tmp_path, "w0") == losses(tmp_path, "w2")


def test_sigterm_saves_and_a_resumed_run_goes_on_from_there(tmp_path, data_loc):
    process = start_training(tmp_path, "run", data_loc, max_iterations=100000, save_latest_interval=100000)
    for line in process.stdout:
        if "3/100000" in line:
            break
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert "saved; resume with: APT_DATA_LOC=" in out and "python -m apt.train --config debug --name run" in out
    saved = load_checkpoint(tmp_path / "ckpt" / "run" / "ckpt_latest.pt")["current_iters"]
    assert saved >= 3
    again = start_training(tmp_path, "run", data_loc, max_iterations=saved + 2, resume=True)
    out, err = again.communicate(timeout=120)
    assert again.returncode == 0, err
    assert f"resume: run at iteration {saved}" in out and f"{saved + 2}/{saved + 2}" in out


def test_a_training_process_killed_at_any_moment_leaves_a_checkpoint_to_resume_from(tmp_path, data_loc):
    process = start_training(tmp_path, "run", data_loc, max_iterations=100000, save_latest_interval=1)
    folder = tmp_path / "ckpt" / "run"
    deadline = time.monotonic() + 90
    while not (folder / "ckpt_latest.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(1.0)
    process.kill()
    process.communicate(timeout=30)
    saved = load_checkpoint(folder / "ckpt_latest.pt")["current_iters"]
    again = start_training(tmp_path, "run", data_loc, max_iterations=saved + 1, resume=True)
    out, err = again.communicate(timeout=120)
    assert again.returncode == 0, err
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


def test_a_kill_during_a_save_leaves_the_old_file_or_the_new_one(tmp_path):
    path = tmp_path / "ckpt_latest.pt"
    payload = torch.arange(500_000, dtype=torch.float32)
    save_checkpoint({"weights": {"w": payload}, "current_iters": 0}, path)
    generation = 0
    for attempt in range(40):
        pid = os.fork()
        if pid == 0:  # writes one generation after another until it is killed
            torch.set_num_threads(1)  # the parent's thread pool did not survive the fork
            while True:
                generation += 1
                save_checkpoint({"weights": {"w": payload + generation}, "current_iters": generation}, path)
        time.sleep(0.002 + 0.0017 * attempt)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        content = load_checkpoint(path)
        generation = content["current_iters"]
        assert torch.equal(content["weights"]["w"], payload + generation)
    assert generation > 0


def adamw_state(parameters: list[torch.nn.Parameter]) -> dict:
    """Of an optimizer after one step."""
    optimizer = torch.optim.AdamW([{"params": parameters[:1]}, {"params": parameters[1:]}])
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return optimizer.state_dict()


MALFORMED = {
    "not a dict": lambda state: [1, 2],
    "no groups": lambda state: {"state": state["state"]},
    "groups of another kind": lambda state: {**state, "param_groups": {"params": [0, 1]}},
    "a group without tensors": lambda state: {**state, "param_groups": [{"lr": 1.0}, {"lr": 1.0}]},
    "no state": lambda state: {"param_groups": state["param_groups"]},
    "a tensor too many": lambda state: {**state, "state": {**state["state"], 2: state["state"][0]}},
    "a name for a number": lambda state: {**state, "state": {"expert": state["state"][0]}},
    "a number for a state": lambda state: {**state, "state": {0: 3}},
    "another optimizer": lambda state: {**state, "state": {0: {"step": 1, "momentum_buffer": torch.zeros(2, 3)}}},
    "one moment": lambda state: {**state, "state": {0: {"step": 1, "exp_avg": torch.zeros(2, 3)}}},
    "a moment that is a list": lambda state: {
        **state, "state": {0: {"step": 1, "exp_avg": [0.0], "exp_avg_sq": torch.zeros(2, 3)}}
    },
    "a moment of another shape": lambda state: {
        **state, "state": {0: {"step": 1, "exp_avg": torch.zeros(6), "exp_avg_sq": torch.zeros(2, 3)}}
    },
    "a step that is a text": lambda state: {
        **state, "state": {0: {"step": "1", "exp_avg": torch.zeros(2, 3), "exp_avg_sq": torch.zeros(2, 3)}}
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", MALFORMED)
def test_a_malformed_optimizer_state_is_refused_whole(tmp_path, kind):
    parameters = [torch.nn.Parameter(torch.zeros(2, 3)), torch.nn.Parameter(torch.zeros(3))]
    saved = adamw_state(parameters)
    backend = DDPBackend("cpu")
    optimizer = torch.optim.AdamW([{"params": parameters[:1]}, {"params": parameters[1:]}])
    backend.prepare(torch.nn.ParameterList(parameters), optimizer)
    with pytest.raises(ValueError):
        backend.load_optimizer_state({"optimizer": MALFORMED[kind](saved)}, tmp_path / LATEST)
    assert not optimizer.state
    backend.load_optimizer_state({"optimizer": saved}, tmp_path / LATEST)
    assert torch.equal(optimizer.state[parameters[0]]["exp_avg"], saved["state"][0]["exp_avg"])


@pytest.mark.parametrize("change", [
    {"moments": []},
    {"moments": {5: {}}},
    {"moments": {0: {"step": 1.0}}},
    {"moments": {0: {"step": 1.0, "exp_avg": torch.zeros(3), "exp_avg_sq": torch.zeros(4)}}},
    {"masters": None},
    {"masters": {0: torch.zeros(5)}},
    {"masters": {0: "weights"}},
])  # fmt: skip
def test_a_malformed_optimizer_shard_is_refused(change):
    good = {"moments": {0: {"step": 1.0, "exp_avg": torch.zeros(4), "exp_avg_sq": torch.zeros(4)}}, "masters": {}}
    check_partitions(good, [torch.zeros(4)])
    with pytest.raises(ValueError):
        check_partitions({**good, **change}, [torch.zeros(4)])


def test_a_run_with_a_malformed_optimizer_and_average_goes_on_with_fresh_ones(tmp_path, located, capsys):
    assert train(tmp_path, "run", max_iterations=1, ema_enabled=True, ema_start=0) == 0
    path = tmp_path / "ckpt/run/ckpt_latest.pt"
    content = dict(load_checkpoint(path))
    content |= {"optimizer": {"state": {0: 1}, "param_groups": []}, "ema": {"shadow_params": "none"}}
    save_checkpoint(content, path)
    assert train(tmp_path, "run", max_iterations=2, ema_enabled=True, ema_start=0, resume=True) == 0
    said = capsys.readouterr().out
    assert "warning: the optimizer starts fresh: its parameter groups hold [] tensors" in said
    assert "warning: the EMA starts fresh: the saved EMA is malformed" in said and "done:" in said


def test_a_resumed_run_keeps_what_its_weights_mean_and_says_what_else_has_changed(tmp_path, located, capsys):
    fields = {"objective": "flow", "arch": "pi"}
    assert train(tmp_path, "run", max_iterations=1, **fields) == 0
    for other, told in (
        ({"objective": "ddim"},
         "trained with objective flow, this would go on with objective ddim; give --objective flow"),
        ({"prediction": "None", "action_scale": "None"},
         "with prediction sample, action_scale 0.1 0.3 1, this would go on with prediction velocity, action_scale "
         "None; give --prediction sample --action_scale 0.1 0.3 1"),
    ):  # fmt: skip
        assert train(tmp_path, "run", max_iterations=2, resume=True, **{**fields, **other}) == 2
        assert told in capsys.readouterr().err
    fields["action_scale"] = (0.1, 0.1, 0.1, 0.3, 0.3, 0.3, 0.3, 0.3, 0.3, 1.0)  # the same in other words
    assert train(tmp_path, "run", max_iterations=2, resume=True, grad_clip=0.5, **fields) == 0
    assert ", grad_clip 1.0 -> 0.5" in capsys.readouterr().out
    assert train(tmp_path, "run", max_iterations=3, resume=True, grad_clip=0.5, **fields) == 0
    assert "changed since" not in capsys.readouterr().out


def test_a_run_of_before_a_field_was_there_meant_what_released_models_do(tmp_path, located, capsys):
    released = {"prediction": "epsilon", "action_scale": "None", "action_step_embedding": False}
    assert train(tmp_path, "run", max_iterations=1, **released) == 0
    (config,) = (tmp_path / "ckpt/run").glob("*.json")
    fields = json.loads(config.read_text())
    config.write_text(json.dumps({name: value for name, value in fields.items() if name not in released}))
    assert train(tmp_path, "run", max_iterations=2, resume=True, action_step_embedding=False) == 2
    assert "give --prediction epsilon --action_scale None" in capsys.readouterr().err
    assert train(tmp_path, "run", max_iterations=2, resume=True, **released) == 0
    assert train(tmp_path, "adapted", max_iterations=1, pretrained_ckpt="run", **released) == 0
    assert "warning: " not in capsys.readouterr().out
    assert train(tmp_path, "other", max_iterations=1, pretrained_ckpt="run") == 0
    said = capsys.readouterr().out
    for field, before, now in (("prediction", "epsilon", "sample"), ("action_scale", "None", "0.1 0.3 1")):
        assert f"trained with {field} {before}, this run uses {now}; --{field} {before} fits it" in said


def test_a_checkpoint_without_its_progress_cannot_be_resumed_and_says_so(tmp_path, located, capsys):
    assert train(tmp_path, "run", max_iterations=1) == 0
    path = tmp_path / "ckpt/run/ckpt_latest.pt"
    save_checkpoint({"weights": load_checkpoint(path)["weights"], "current_iters": "many"}, path)
    assert train(tmp_path, "run", max_iterations=2, resume=True) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "ckpt_latest.pt does not say how far its run was" in line and "--pretrained_ckpt" in line
