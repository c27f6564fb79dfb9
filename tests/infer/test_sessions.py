"""Sessions on one policy: apart in what they know, one at a time on the device, in the order of asking."""

from __future__ import annotations

import dataclasses
import threading
import time

import numpy as np
import pytest
import torch

from apt.checkpoint import write_config
from apt.hub_folder import write_folder
from apt.infer.plan import Timing
from apt.infer.planner import TrajPlanner
from apt.infer.policy import Policy, pick_device
from apt.infer.turns import FairLock
from apt.presets import CONFIGS
from tests.conftest import GOLDEN
from tests.infer.helpers import frame_at, tiny_policy
from tests.model.helpers import make_observation
from train_utils.saving import save_checkpoint


def session(policy, **options) -> TrajPlanner:
    planner = TrajPlanner.of_policy(policy, **{"ensemble": 0, "steps": 1, **options})
    planner.set_prompt("reach for the red square")
    return planner


def plan(planner, dataset, frame: int, prompt: str | None = None) -> np.ndarray:
    if prompt is not None:
        planner.set_prompt(prompt)
    planner.add_obs_frame(frame_at(dataset, 0, frame))
    return planner.get_action()[0]


def test_what_one_session_is_told_no_other_one_knows(policy, dataset):
    alone = session(policy, ensemble=3)
    wanted = [plan(alone, dataset, frame) for frame in (2, 4, 6)]

    first = session(policy, ensemble=3)
    second = first.session(seed=5)
    assert second.get_action() is None  # first's frames are not second's
    got = []
    for frame in (2, 4, 6):
        got.append(plan(first, dataset, frame))
        plan(second, dataset, frame + 10, "put the milk away")
        second.reset()
    assert all(np.array_equal(one, other) for one, other in zip(got, wanted, strict=True))


def test_a_session_begins_with_its_parents_settings(policy):
    parent = session(policy, ensemble=3, sampler="dpm")
    child = parent.session()
    assert child.get_config() == parent.get_config() and child.policy is parent.policy
    with pytest.raises(ValueError, match="call set_prompt first"):  # but not with its instruction
        child.add_obs_frame(blank_frame(child.get_config()))
        child.get_action()


def blank_frame(config) -> dict:
    camera = {
        "camera": {"width": 64, "height": 64, "K": np.array([[64, 0, 32], [0, 64, 32], [0, 0, 1.0]])},
        "data": {"color": np.zeros((64, 64, 3), np.uint8), "wcT": np.eye(4), "seg": None},
    }
    return {**dict.fromkeys(config.cameras, camera), "ee_pose": np.eye(4), "gripper": 0.5, "timestamp": 0.0}


@pytest.mark.parametrize("wrong, named", [("", "is empty"), (" \n", "is empty"), (None, "is None"), (3, "is 3")])
def test_an_instruction_that_says_nothing_is_refused_and_the_old_one_stays(policy, wrong, named):
    planner = session(policy)
    with pytest.raises(ValueError, match=f"the prompt {named}.*; wanted a text"):
        planner.set_prompt(wrong)
    assert planner.prompt == "reach for the red square"
    if wrong is not None:  # there it means the one that was set
        with pytest.raises(ValueError, match="the prompt is"):
            planner.run_inference(blank_frame(planner.get_config()), wrong)
        assert planner.get_action() is None, "the frame was not taken"


def test_a_reset_during_a_query_leaves_no_trace_of_it(policy, dataset, monkeypatch):
    planner = session(policy, ensemble=3)
    infer = policy.queue._infer

    def overtaken(*arguments):
        planner.reset()
        return infer(*arguments)

    planner.add_obs_frame(frame_at(dataset, 0, 2))
    with monkeypatch.context() as patch:
        patch.setattr(policy.queue, "_infer", overtaken)
        assert planner.get_action() is not None
    assert not planner._ensemblers and planner.get_action() is None


@pytest.mark.parametrize("name", ["ensemble", "ensemble_dense"])
def test_a_planners_ensemble_is_the_released_ones(policy, name):
    archive = np.load(GOLDEN / "geometry" / f"{name}.npz")
    planner = session(policy)
    planner.set_ensemble_nums(4)
    for _ in range(2):  # after a reset everything as before
        for k in range(len(archive.files) // 5):
            times, position, rotation = (archive[f"{k}.{key}"] for key in ("time", "pos", "rot"))
            poses = np.tile(np.eye(4), (len(times), 1, 1, 1))
            poses[:, 0, :3, :3], poses[:, 0, :3, 3] = rotation, position
            blended, _ = planner.ensemble_traj(poses, np.zeros((len(times), 1)), times)
            np.testing.assert_allclose(blended[:, 0, :3, 3], archive[f"{k}.pos_out"], atol=1e-5)
            np.testing.assert_allclose(blended[:, 0, :3, :3], archive[f"{k}.rot_out"], atol=1e-5)
        planner.reset()
    planner.set_ensemble_nums(0)
    for wrong in (-1, 2.5, True):
        with pytest.raises(ValueError, match="ensemble size"):
            planner.set_ensemble_nums(wrong)


def test_queries_are_served_in_the_order_of_asking():
    lock, order, threads = FairLock(), [], []

    def ask(name: int) -> None:
        with lock:
            order.append(name)

    with lock:
        for name in range(5):
            threads.append(threading.Thread(target=ask, args=(name,)))
            threads[-1].start()
            while len(lock._waiting) <= name:
                time.sleep(0.001)
        assert order == []
    for thread in threads:
        thread.join(timeout=10)
    assert order == list(range(5))
    assert not lock._held


def test_threads_on_one_policy_get_what_each_would_alone(policy, dataset):
    frames = [frame_at(dataset, 0, frame) for frame in range(5)]
    wanted, got = {}, {}
    for number in range(5):
        planner = session(policy, seed=number)
        planner.add_obs_frame(frames[number])
        wanted[number] = planner.get_action()[0]

    def work(number: int) -> None:
        planner = session(policy, seed=number)
        planner.add_obs_frame(frames[number])
        got[number] = planner.get_action()[0]

    threads = [threading.Thread(target=work, args=(number,)) for number in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    for number in range(5):
        np.testing.assert_allclose(got[number], wanted[number], atol=1e-5)


def test_a_plan_says_where_its_time_went(policy, dataset):
    planner = session(policy)
    planner.add_obs_frame(frame_at(dataset, 0, 2))
    with policy.queue.turns:
        waiting = threading.Thread(target=planner.get_action)
        waiting.start()
        time.sleep(0.2)
    waiting.join(timeout=30)
    timing = planner.last_timing
    assert isinstance(timing, Timing) and timing.wait > 0.1
    parts = timing.to_dict()
    total = parts.pop("total")
    assert min(parts.values()) >= 0 and sum(parts.values()) <= total
    assert timing.vlm > 0 and timing.prefix > 0 and timing.denoise > 0


def test_steps_and_sampler_may_be_chosen_per_query(policy, dataset):
    def asked(**options):
        planner = session(policy, steps=3)
        planner.add_obs_frame(frame_at(dataset, 0, 2))
        return planner.get_action(**options)[0]

    usual = asked()
    assert np.array_equal(usual, asked(steps=3, sampler="ddim"))
    assert not np.allclose(usual, asked(sampler="dpm")) and not np.allclose(usual, asked(steps=2))
    for wrong, named in (
        ({"steps": 0}, "0 denoising steps"),
        ({"sampler": "x"}, "sampler 'x'"),
        ({"sample_num": 0}, "0"),
    ):
        with pytest.raises(ValueError, match=named):
            asked(**wrong)


def test_samples_of_one_query_are_those_of_a_batch_of_its_copies(policy):
    observation = make_observation(policy.model.vlm, ["go"])
    many = make_observation(policy.model.vlm, ["go"] * 3)
    for field in dataclasses.fields(many):  # copies of the one
        value = getattr(observation, field.name)
        if isinstance(value, torch.Tensor) and field.name not in ("image_index", "position_ids"):
            setattr(many, field.name, value.repeat_interleave(3, 0))
    (states,), _ = policy.infer([policy.request(observation, policy.generator(3), samples=3, steps=2)])
    wanted = policy.model.predict(many, steps=2, generator=policy.generator(3))
    np.testing.assert_allclose(states, wanted.numpy(), atol=1e-4)


def test_a_policy_with_adapters_is_loaded_merged_from_a_file_or_a_folder(tmp_path):
    """Same outputs, and not a parameter more than the VLM has without adapters."""
    unmerged, plain = tiny_policy(vlm_mode="lora").model, tiny_policy().model
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in unmerged.vlm.qwen.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    content = {"weights": unmerged.released_weights(), "vlm_weights": unmerged.released_vlm_weights()}
    config = dataclasses.replace(CONFIGS["debug"], vlm_finetune_mode="lora", train_stage=1).to_dict()
    (tmp_path / "run").mkdir()
    save_checkpoint(content, tmp_path / "run" / "ckpt_latest.pt")
    write_config(tmp_path / "run", config)
    write_folder(content, config, "", tmp_path / "exported")

    observation = make_observation(unmerged.vlm, ["pick up the milk", "go"])
    with torch.no_grad():
        wanted, base = unmerged.vlm(observation), plain.vlm(observation)
        for path in (tmp_path / "run" / "ckpt_latest.pt", tmp_path / "exported"):
            model = Policy.load(path, "cpu").model
            got = model.vlm(observation)
            for feature, stream in wanted.hidden_states.items():
                scale = stream.abs().max()
                assert (stream - got.hidden_states[feature]).abs().max() < 1e-5 * scale
            assert (base.hidden_states[feature] - got.hidden_states[feature]).abs().max() > 1e-2 * scale
            counts = [sum(parameter.numel() for parameter in m.parameters()) for m in (model, plain)]
            assert counts[0] == counts[1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_device_that_is_not_there_is_named():
    assert pick_device() == torch.device("cpu")
    with pytest.raises(ValueError, match="'cuda' was asked for, torch sees 0 CUDA devices; use device='cpu'"):
        pick_device("cuda")
    with pytest.raises(ValueError, match="'gpu9' is unknown"):
        pick_device("gpu9")
    with pytest.raises(ValueError, match="'graphs' records CUDA graphs"):
        tiny_policy(compile="graphs")
