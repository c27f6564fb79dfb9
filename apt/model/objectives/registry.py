"""The objectives and what each may predict, by the names that they have in a configuration."""

from __future__ import annotations

import pkgutil
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from apt.model.objectives.base import Objective

#: name -> ``module:class``; a module is imported where its objective is used
OBJECTIVES = {
    "ddim": "apt.model.objectives.diffusion:Diffusion",
    "flow": "apt.model.objectives.flow:FlowMatching",
}

#: name -> what the network's answer may mean, the usual first; of ``ddim`` in diffusers' words
PREDICTIONS = {
    "ddim": ("epsilon", "sample", "v_prediction"),
    "flow": ("velocity", "sample"),
}


def prediction_of(name: str, prediction: str | None) -> str:
    """What the network predicts under the objective ``name``; None: the usual.

    Raises:
        ValueError: an unknown objective, or a prediction that is not one of its own.
    """
    if name not in OBJECTIVES:
        raise ValueError(f"unknown objective {name!r}; choose from {', '.join(OBJECTIVES)}")
    if prediction is None:
        return PREDICTIONS[name][0]
    if prediction not in PREDICTIONS[name]:
        own = ", ".join(PREDICTIONS[name])
        raise ValueError(f"prediction {prediction!r} is not one of the objective {name!r}; choose from {own}")
    return prediction


def make_objective(
    name: str,
    train_timesteps: int = 100,
    inference_timesteps: int | None = None,
    flow_steps: int = 10,
    prediction: str | None = None,
) -> Objective:
    """An objective by its name in :data:`OBJECTIVES`.

    Args:
        inference_timesteps: None: the usual number, 20 for ``ddim`` and ``flow_steps`` for ``flow``.
        prediction: one of its :data:`PREDICTIONS`; None: the usual.
    Raises:
        ValueError: see :func:`prediction_of`.
    """
    prediction = prediction_of(name, prediction)
    usual = {"ddim": 20, "flow": flow_steps}[name]
    kind = pkgutil.resolve_name(OBJECTIVES[name])
    return kind(train_timesteps, usual if inference_timesteps is None else inference_timesteps, prediction)
