"""The trained model as a policy: behind the service, or in the simulator's own process."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from data_utils.geometry.resample import at_control_steps
from examples.libero.policy_settings import PolicyError, PolicySettings
from examples.libero.rollout import EpisodeKey, Plan, Policy
from shm_transport import get_shm_proxy

if TYPE_CHECKING:
    from examples.libero.simulator import LiberoEnv


LIBERO_CAMERAS = ("agentview", "eye_in_hand")


def open_planner(settings: PolicySettings) -> tuple[Any, dict[str, Any]]:
    """A planner and the contract of what it wants to be shown: a client of the service, or one in this process.

    Raises:
        TransportError: no service; PolicyError, CheckpointError: a checkpoint that is of no use here.
    """
    if settings.ckpt is None:
        planner = _connect(settings)
        return planner, planner.observation_contract()
    return _load(settings)


def describe_model(settings: PolicySettings) -> dict[str, Any]:
    """What is evaluated: the checkpoint and how it is sampled (JSON-able). Loads no weights.

    Raises:
        TransportError: no service; PolicyError: a checkpoint that is of no use here, or was trained on another robot.
    """
    if settings.ckpt is not None:
        contract, described = _read(settings)
    else:
        with _connect(settings) as service:
            contract, served = service.observation_contract(), service.ping()
            described = {name: served[name] for name in ("checkpoint", "sampling")} | {"config": service.get_config()}
    _check_contract(contract)
    return described


class ModelPolicy(Policy):
    """Asks a planner at every query and follows its trajectory until the next.

    Args:
        planner: ``TrajPlanner``, or a client of the service that has its methods. Times count control steps.
        contract: what it wants to be shown, as ``observation_contract()`` tells it.
    """

    needs_images = True

    def __init__(self, planner: Any, contract: dict[str, Any]) -> None:
        self._planner = planner
        self._cameras = [camera["name"] for camera in contract["cameras"]]
        self._steps_back = contract["history"]["time_steps_back"]
        self._past_images = contract["history"]["images"] > 1

    def begin(self, env: LiberoEnv, instruction: str, episode: EpisodeKey) -> None:
        # Noise of the episode's own: results do not depend on which process runs it, or after which other.
        self._planner.reset(seed=episode.derived_seed("policy"))
        self._planner.set_prompt(instruction)

    def instruct(self, env: LiberoEnv, instruction: str) -> None:
        self._planner.reset()  # trajectories that the last instruction led to are not blended with those to come
        self._planner.set_prompt(instruction)

    def observe(self, env: LiberoEnv) -> None:
        if self._steps_back > 0:
            # A policy of one image looks at the newest frame's: those of the last query fill the frames before it.
            self._planner.add_obs_frame(self._frame(env, render=self._past_images))

    def plan(self, env: LiberoEnv) -> Plan:
        self._planner.add_obs_frame(self._frame(env, render=True))
        answer = self._planner.get_action()
        if answer is None:
            raise PolicyError("the planner gave no action although it has a frame; restart the service")
        poses, openness, times = (np.asarray(part, np.float64) for part in answer[:3])
        return Plan(*at_control_steps(env.time, times, poses[0, :, 0], openness[0, :, 0]))  # sample 0, arm 0

    def close(self) -> None:
        if hasattr(self._planner, "close"):  # a client has a connection
            self._planner.close()

    def _frame(self, env: LiberoEnv, render: bool) -> dict[str, Any]:
        """The present moment as ``apt.infer.frames.parse_frame`` takes it."""
        if render:
            self._images = {camera: env.rgb(camera) for camera in self._cameras}
        frame: dict[str, Any] = {
            "ee_pose": env.world_from_ee,
            "gripper": env.openness,
            "timestamp": float(env.time),
        }
        for camera, image in self._images.items():
            frame[camera] = {
                "model": "pinhole",
                "camera": {"width": image.shape[1], "height": image.shape[0], "K": env.intrinsics(camera)},
                "data": {"color": image, "wcT": env.world_from_cam(camera), "seg": None},
            }
        return frame


def _check_contract(contract: dict[str, Any]) -> None:
    """Raises ``PolicyError`` that lists everything in which LIBERO differs from what a policy wants to be shown."""
    found = []
    wanted = [camera["name"] for camera in contract["cameras"]]
    if missing := [name for name in wanted if name not in LIBERO_CAMERAS]:
        found.append(f"it wants {', '.join(missing)}; LIBERO's cameras are {', '.join(LIBERO_CAMERAS)}")
    if contract["arms"]["fewest"] > 1:
        found.append(f"it moves {contract['arms']['fewest']} arms; LIBERO has one")
    if (unit := contract["clock"]["unit"]) != "control steps":
        found.append(f"its times are {unit}; LIBERO's are control steps")
    if found:
        raise PolicyError(f"the policy was not trained for LIBERO: {'; '.join(found)}; serve another checkpoint")


def _connect(settings: PolicySettings) -> Any:
    return get_shm_proxy(settings.controller_name, settings.controller_host, settings.controller_port)


def _load(settings: PolicySettings) -> tuple[Any, dict[str, Any]]:
    torch = _import_torch()
    from apt.infer.contract import ObservationContract
    from apt.infer.planner import TrajPlanner

    device = f"cuda:{settings.gpu}" if torch.cuda.is_available() else "cpu"
    planner = TrajPlanner(
        settings.ckpt, device, settings.ensemble, use_ema=settings.ema, steps=settings.denoising_steps
    )
    return planner, ObservationContract(planner.get_config()).to_dict()


def _read(settings: PolicySettings) -> tuple[dict[str, Any], dict[str, Any]]:
    """The contract and the description of a checkpoint, from the configuration beside it."""
    _import_torch()
    from apt.checkpoint import CheckpointError, checkpoint_sha256, read_config
    from apt.configs import train_config_from_dict
    from apt.infer.contract import ObservationContract
    from apt.model.objectives.registry import make_objective

    path = settings.ckpt
    try:
        trained, _ = train_config_from_dict(read_config(path))
    except CheckpointError as error:
        raise PolicyError(str(error)) from error
    config = trained.data_configs()[0]
    return ObservationContract(config).to_dict(), {
        "checkpoint": {
            "name": f"{path.resolve().parent.name}/{path.name}",
            "sha256": checkpoint_sha256(path),
            "ema": settings.ema,
        },
        "sampling": {
            "ensemble": settings.ensemble,
            "steps": settings.denoising_steps,
            "sampler": make_objective(trained.objective).samplers[0],
            "chunking": None,
        },
        "config": config.to_dict(),
    }


def _import_torch() -> ModuleType:
    try:
        import torch
    except ImportError as error:
        what = f"--ckpt needs the model's libraries in {sys.prefix} ({error})"
        how = "bash examples/libero/setup.sh --venv .venv brings the simulator to them, for PYTHON=.venv/bin/python"
        raise PolicyError(f"{what}; {how}; or start the service and leave --ckpt out") from error
    return torch
