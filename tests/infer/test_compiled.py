"""Compiled policies: the same numbers, nothing compiled anew when the instruction changes, nothing that CUDA graphs
could not record."""

from __future__ import annotations

import contextlib
import dataclasses
import functools

import numpy as np
import pytest
import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from apt.infer.planner import TrajPlanner
from apt.infer.realtime_chunking import RealTimeChunking
from apt.infer.stages import STAGES, Stages
from apt.model.compilation import PROMPT_BUCKET
from apt.model.experts.context import SamplingRun
from apt.model.experts.registry import ARCHITECTURES
from data_utils.batches.collate import Collator
from data_utils.types import map_tensors
from tests.infer.helpers import tiny_policy
from tests.infer.test_sessions import blank_frame
from tests.model.helpers import make_observation, make_sample

PROMPTS = [
    "go",
    "pick up the milk",
    "pick up the cereal box and put it into the small round bowl beside the stove, then go",
]


def planned(planner: TrajPlanner, prompt: str, time: float = 0.0) -> np.ndarray:
    planner.reset(seed=0)
    planner.set_prompt(prompt)
    planner.add_obs_frame({**blank_frame(planner.get_config()), "timestamp": time})
    return planner.get_action()[0]


def small_planner(compile: str = "none", **changes) -> TrajPlanner:
    """Two blocks and few decoder layers: compilation takes its time."""
    return TrajPlanner.of_policy(tiny_policy(compile, vlm_layer_stride=3, **changes), ensemble=0, steps=2)


@pytest.fixture
def eager() -> TrajPlanner:
    return small_planner()


def test_padding_to_a_bucket_changes_no_plan(eager):
    """Left padding counts in a token's position; only differences of positions reach the attention."""
    policy = eager.policy
    tokenize = policy.prompt_tokenizer((64, 64))
    sample = make_sample("pick up the milk", 0, num_future=32)
    states = []
    for multiple in (1, PROMPT_BUCKET, 4 * PROMPT_BUCKET):
        observation = Collator(tokenize, tokenize.pad_id, 2, 1, multiple)([sample]).observation
        states.append(policy.infer([policy.request(observation, policy.generator(0), steps=2)])[0][0])
        assert observation.input_ids.shape[1] % multiple == 0
    for padded in states[1:]:
        np.testing.assert_allclose(padded, states[0], atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "arch, objective", [("apt", "ddim"), ("pi", "flow"), ("gr00t", "flow"), ("token_insertion", "flow")]
)
def test_after_warm_up_a_new_instruction_compiles_nothing(arch, objective, monkeypatch):
    """Graphs and guards as in earnest; the code of the graphs is torch's own, which takes seconds, not minutes."""
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    eager = small_planner(arch=arch, objective=objective)
    planner = small_planner("compile", arch=arch, objective=objective)
    planner.warm_up(prompt_tokens=40)
    with torch.compiler.set_stance("fail_on_recompile"):
        lengths = set()
        for prompt in PROMPTS:
            np.testing.assert_allclose(planned(planner, prompt), planned(eager, prompt), atol=1e-5)
            lengths.add(len(planner.policy.prompt_tokenizer((64, 64))(prompt, 2).ids))
        assert len(lengths) == 3
        planner.get_action(steps=3, sampler=planner.policy.samplers[-1])  # as many steps as one likes
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes", [{"prediction": "sample", "action_scale": (0.1, 0.3, 1.0)}, {"arch": "pi", "objective": "flow"}], ids=str
)
def test_compiled_code_gives_the_same_plans(changes):
    torch._dynamo.reset()
    eager = small_planner(**changes)
    planner = small_planner("compile", **changes)
    planner.set_chunking(RealTimeChunking(2.0))
    other = eager.session()
    other.set_chunking(RealTimeChunking(2.0))
    for prompt in PROMPTS[:2]:
        np.testing.assert_allclose(planned(planner, prompt), planned(other, prompt), atol=1e-5)
    frame = blank_frame(planner.get_config())
    for each in (planner, other):
        each.add_obs_frame({**frame, "timestamp": 4.0})
    np.testing.assert_allclose(planner.get_action()[0], other.get_action()[0], atol=1e-5)  # goes on from the first
    torch._dynamo.reset()


class HostTraffic(TorchDispatchMode):
    """Operations that would stop a recording of CUDA graphs: values read by the host, constants sent from it."""

    READ = ("_local_scalar_dense", "nonzero", "masked_select", "lift_fresh", "item")

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        given = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        on_device = any(t.device.type == "meta" for t in pytree.tree_leaves(out) if isinstance(t, torch.Tensor))
        from_host = on_device and any(t.device.type == "cpu" and (t.ndim or "copy" in str(function)) for t in given)
        reads = any(name in str(function) for name in self.READ) and any(t.device.type == "meta" for t in given)
        if from_host or reads:
            self.seen.append(str(function))
        return out


@pytest.mark.parametrize("arch, stage", [("apt", 0), *((arch, 1) for arch in ARCHITECTURES)])
def test_no_stage_of_a_query_talks_to_the_host(arch, stage, monkeypatch):
    """On the meta device, which stands for a GPU: it has shapes and no values."""
    policy = tiny_policy(train_stage=stage, arch=arch)
    model = policy.model
    observation = make_observation(model.vlm, ["go"])
    run = model.expert.sampling_run(2)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # knows no meta device
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device_type: False)
    model.to("meta")
    observation = map_tensors(observation, lambda tensor: tensor.to("meta"))
    run = SamplingRun(run.modulations.to("meta"), run.coefficients.to("meta"))
    noise = torch.zeros(1, 1, 32, 10, device="meta")
    marks: list[str] = []
    with torch.no_grad():
        Stages(model).run(observation, noise, run, None, marks.append)  # fills caches by image size
        with HostTraffic() as traffic:
            states = Stages(model).run(observation, noise, run, None, marks.append)
    assert traffic.seen == [] and marks == [*STAGES, *STAGES]
    assert states.device.type == "meta" and states.shape == (1, 32, 1, 17)


def gpu_policies(*modes):
    for mode in modes:
        policy = tiny_policy()
        config = dataclasses.replace(policy.train_config, fp16=False)
        yield type(policy)(policy.model, config, "cuda", mode)


@pytest.mark.gpu
def test_graphs_on_a_gpu_give_the_same_plans():
    plans = []
    for policy in gpu_policies("none", "compile", "graphs"):
        planner = TrajPlanner.of_policy(policy, ensemble=0, steps=4)
        planner.warm_up(prompt_tokens=40)
        plans.append([planned(planner, prompt) for prompt in (*PROMPTS, PROMPTS[0])])
    for other in plans[1:]:
        np.testing.assert_allclose(other, plans[0], atol=1e-3)
