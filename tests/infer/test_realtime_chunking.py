"""Real-time chunking: the frozen steps are the last chunk's, and the motion does not change its mind at the seam."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from apt.infer.planner import TrajPlanner
from apt.infer.realtime_chunking import RealTimeChunking
from apt.model.objectives.base import Guide, Schedule
from apt.model.objectives.diffusion import Diffusion
from data_utils.datasets import AlohaPickPlace
from infer_utils.trajectory_ensembler import interpolate_poses
from tests.infer.helpers import frame_at, tiny_policy


def planner_with(policy, chunking, seed=0) -> TrajPlanner:
    planner = TrajPlanner.of_policy(policy, ensemble=0, steps=3, chunking=chunking, seed=seed)
    planner.set_prompt("reach for the red square")
    return planner


def test_weights_are_one_while_frozen_then_fall_to_zero_at_the_chunks_end():
    times = np.arange(1.0, 11.0)
    weights = RealTimeChunking(delay=3.0).weights(times, now=0.0, until=8.0)
    assert (weights[:3] == 1).all() and (weights[7:] == 0).all()
    assert (np.diff(weights[2:8]) < 0).all()
    for wrong in (-1, float("nan"), "0.1", True, None):
        with pytest.raises(ValueError, match=f"delay is {wrong!r}; wanted"):
            RealTimeChunking(wrong)


def test_a_delay_as_long_as_the_chunk_is_refused_in_the_clocks_unit(policy, dataset):
    planner = planner_with(policy, RealTimeChunking(31.0))  # a chunk is 32 control steps long
    with pytest.raises(ValueError, match="delay is 32 control steps, and a chunk is 32 control steps long"):
        planner.set_chunking(RealTimeChunking(32.0))
    seconds = dataclasses.replace(AlohaPickPlace.config, image_hw=(64, 64))
    with pytest.raises(ValueError, match="delay is 31 seconds, and a chunk is 6.4 seconds long"):
        planner.set_config(seconds)
    measured = dataclasses.replace(dataset.config, sample_dt=None, record_dt=None)
    planner.set_config(measured)
    planner.set_chunking(RealTimeChunking(100.0))
    planner.add_obs_frames([frame_at(dataset, 0, frame) for frame in (0, 1)])
    with pytest.raises(ValueError, match="delay is 100 seconds, and a chunk is 32 seconds long"):
        planner.get_action()


@pytest.fixture(scope="module", params=[{}, {"prediction": "sample", "action_scale": (0.1, 0.3, 2.0)}], ids=str)
def any_policy(request):
    return tiny_policy(**request.param)


@pytest.mark.parametrize("sampler", ["ddim", "dpm"])
def test_frozen_steps_come_out_equal_to_the_last_chunk(any_policy, dataset, sampler):
    """Though the arm has moved on, seen from a wrist camera that moves along."""
    policy = any_policy
    planner = planner_with(policy, RealTimeChunking(delay=6.0))
    planner.add_obs_frame(frame_at(dataset, 0, 3))
    first = planner.run_inference(sampler=sampler)
    planner.add_obs_frame(frame_at(dataset, 0, 8))
    second = planner.run_inference(sampler=sampler)
    frozen = second.times <= 8 + 6
    assert frozen.sum() == 6
    wanted = interpolate_poses(first.times, first.poses[0], second.times[frozen])
    np.testing.assert_allclose(second.poses[0, frozen], wanted, atol=1e-4)
    same = np.isin(first.times, second.times[frozen])
    np.testing.assert_allclose(second.grippers[0, frozen], first.grippers[0, same], atol=1e-4)
    free = planner_with(policy, None)
    for frame in (3, 8):
        free.add_obs_frame(frame_at(dataset, 0, frame))
        unguided = free.run_inference(sampler=sampler)
    assert np.abs(unguided.poses[0, frozen, :, :3, 3] - wanted[..., :3, 3]).max() > 1e-2


def test_reset_forgets_the_last_chunk(policy, dataset):
    chunked, free = planner_with(policy, RealTimeChunking(6.0)), planner_with(policy, None)
    plans = []
    for planner in (chunked, free):
        planner.add_obs_frame(frame_at(dataset, 0, 3))
        planner.get_action()
        planner.reset()
        planner.add_obs_frame(frame_at(dataset, 0, 5))
        plans.append(planner.get_action()[0])
    assert np.array_equal(*plans)


def test_a_chunk_that_has_ended_constrains_nothing(policy, dataset):
    chunked, free = planner_with(policy, RealTimeChunking(6.0)), planner_with(policy, None)
    plans = []
    for planner in (chunked, free):
        frame = frame_at(dataset, 0, 3)
        planner.add_obs_frame(frame)
        planner.get_action()
        planner.add_obs_frame({**frame, "timestamp": 100.0})
        plans.append(planner.get_action()[0])
    assert np.array_equal(*plans)


def test_ensembling_and_chunking_exclude_each_other(policy):
    with pytest.raises(ValueError, match="exclude each other"):
        TrajPlanner.of_policy(policy, ensemble=4, chunking=RealTimeChunking(1.0))
    planner = planner_with(policy, RealTimeChunking(1.0))
    with pytest.raises(ValueError, match="exclude each other"):
        planner.set_ensemble_nums(2)
    planner.set_chunking(None)
    planner.set_ensemble_nums(2)
    with pytest.raises(ValueError, match="exclude each other"):
        planner.set_chunking(RealTimeChunking(1.0))


# Two ways around an obstacle: chunks of 16 positions go left or right, the policy knows both. Its exact noise is known.

STEPS = 16


def two_ways() -> torch.Tensor:
    """(2, 16) sideways positions of the two motions."""
    bend = torch.sin(torch.linspace(0, torch.pi, STEPS)).double()
    return torch.stack([bend, -bend])


def chunk(diffusion: Diffusion, means: torch.Tensor, noise: torch.Tensor, guide: Guide | None = None) -> torch.Tensor:
    schedule = diffusion.schedule(20)
    exact = Schedule(schedule.timesteps, schedule.coefficients.double())
    alphas = diffusion._scheduler.alphas_cumprod.double()

    def predict(x: torch.Tensor, index: int) -> torch.Tensor:
        alpha = alphas[exact.timesteps[index]]
        variance = alpha * 0.03**2 + 1 - alpha
        offset = x.unsqueeze(1) - alpha.sqrt() * means
        share = torch.softmax(-offset.square().sum(-1) / (2 * variance), -1)
        return (1 - alpha).sqrt() * (share.unsqueeze(-1) * offset).sum(1) / variance

    return diffusion.sample(predict, noise, exact, guide)


def test_a_chunk_goes_on_the_way_the_last_one_took():
    """64 robots half-way along; the next chunk sees the same two ways, from where it is frozen on."""
    diffusion, ways = Diffusion(), two_ways()
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randn(2, 64, STEPS, generator=generator).double()
    executed = chunk(diffusion, ways, first)
    moved = 4  # steps since then; the new chunk covers steps 4 to 19, of which 12 are known
    new_ways = torch.cat([ways[:, moved:], ways[:, -1:].expand(2, moved)], dim=1)
    times = np.arange(1, STEPS + 1) + moved
    weight = torch.from_numpy(RealTimeChunking(delay=3.0).weights(times, now=moved, until=STEPS))
    target = torch.cat([executed[:, moved:], executed[:, -1:].expand(-1, moved)], dim=1)
    free, guided = chunk(diffusion, new_ways, second), chunk(diffusion, new_ways, second, Guide(target, weight))
    torch.testing.assert_close(guided[:, :3], target[:, :3], atol=1e-9, rtol=0)

    def jump(new: torch.Tensor) -> torch.Tensor:
        """At the seam: the robot follows the executed chunk for 3 steps, then the new one."""
        return (new[:, 3] - executed[:, moved + 2]).abs()

    smooth = (ways[0, moved + 3] - ways[0, moved + 2]).abs()
    assert jump(free).mean() > 5 * jump(guided).mean()
    assert jump(guided).max() < smooth + 0.15
    # And it stays there: no chunk ends between the ways.
    nearest = (guided.unsqueeze(1) - new_ways).abs().amax(-1).amin(1)
    assert nearest.median() < 0.06 and nearest.max() < 0.25
