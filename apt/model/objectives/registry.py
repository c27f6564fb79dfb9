"""The objectives, by the name that ``objective`` has in a configuration."""

from __future__ import annotations

import pkgutil

from apt.model.objectives.base import Objective

#: name -> ``module:class``; a module is imported where its objective is used
OBJECTIVES = {
    "ddim": "apt.model.objectives.diffusion:Diffusion",
    "flow": "apt.model.objectives.flow:FlowMatching",
}


def make_objective(
    name: str, train_timesteps: int = 100, inference_timesteps: int | None = None, flow_steps: int = 10
) -> Objective:
    """An objective by its name in :data:`OBJECTIVES`.

    Args:
        inference_timesteps: None: the usual number, 20 for ``ddim`` and ``flow_steps`` for ``flow``.
    """
    usual = {"ddim": 20, "flow": flow_steps}[name]
    kind = pkgutil.resolve_name(OBJECTIVES[name])
    return kind(train_timesteps, usual if inference_timesteps is None else inference_timesteps)
