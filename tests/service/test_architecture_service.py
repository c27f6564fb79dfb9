"""The service serves every architecture and objective."""

from __future__ import annotations

import pytest

from apt.infer.planner import TrajPlanner
from tests.infer.helpers import frame_at
from tests.model.test_architectures import KINDS
from tests.service.helpers import PROMPT, STEPS, connect, running_policy, write_checkpoint
from tests.service.test_service import agree

QUICK = "pi-flow"
# All but what the other tests of the service serve.
PARAMS = [
    pytest.param(kind, marks=() if str(kind) == QUICK else pytest.mark.slow, id=str(kind))
    for kind in KINDS
    if str(kind) != "apt-ddim"
]


@pytest.mark.parametrize("kind", PARAMS)
def test_a_client_plans_as_if_the_planner_were_its_own(kind, tmp_path, ns_port, dataset):
    checkpoint = write_checkpoint(tmp_path / "tiny", arch=kind.arch, objective=kind.objective)
    local, uri = TrajPlanner(checkpoint, "cpu", steps=STEPS), f"apt_{kind}"
    usual = local.policy.samplers[-1]
    with running_policy(checkpoint, ns_port, uri=uri), connect(ns_port, uri) as robot:
        for planner in (robot, local):
            planner.set_prompt(PROMPT)
        for time in (3, 5):  # the ensemble blends
            for planner in (robot, local):
                planner.add_obs_frame(frame_at(dataset, 0, time))
            agree(robot.get_action(2), local.get_action(2))
        agree(robot.get_action(steps=3, sampler=usual), local.get_action(steps=3, sampler=usual))
        with pytest.raises(ValueError, match="sampler 'heun' is not one of the objective .*choose from"):
            robot.get_action(sampler="heun")
