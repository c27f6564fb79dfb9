"""What a client of the service may call: a planner session of its own, behind the observation contract."""

from __future__ import annotations

import dataclasses
import os
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

import apt
from apt.infer.contract import FirstFrames, ObservationContract
from apt.infer.plan import Plan
from apt.infer.planner import TrajPlanner
from apt.infer.realtime_chunking import RealTimeChunking
from apt.infer.service_status import QueryLog
from shm_transport import expose


@dataclass(frozen=True)
class Checkpoint:
    """Which weights are served."""

    name: str
    sha256: str
    ema: bool = False
    """Whether the averaged ones."""


class PolicyService:
    """A loaded policy and the count of what was asked of it.

    Args:
        planner: whose settings and policy every client's session gets.
        checkpoint: what was loaded.
        uri: the service's name.
        clients: who is connected, as ``ShmServer.clients`` says.
    """

    def __init__(
        self, planner: TrajPlanner, checkpoint: Checkpoint, uri: str, clients: Callable[[], list[dict[str, Any]]]
    ) -> None:
        self.planner, self.checkpoint, self.uri = planner, checkpoint, uri
        self.log = QueryLog()
        self._clients = clients
        self._started = time.monotonic()

    def session(self) -> "ClientSession":
        """For a client that has just connected."""
        return ClientSession(self)

    def contract(self, planner: TrajPlanner) -> ObservationContract:
        """What a session's config wants to be shown."""
        return ObservationContract(planner.get_config(), follows_prompt=planner.train_config.train_stage == 1)

    def identity(self) -> dict[str, Any]:
        """Which service this is, as plain data."""
        return {
            "ready": True,
            "uri": self.uri,
            "version": apt.__version__,
            "checkpoint": dataclasses.asdict(self.checkpoint),
            "sampling": self.planner.sampling,
            "device": str(self.planner.device),
            "uptime_s": time.monotonic() - self._started,
            "host": socket.gethostname(),
            "pid": os.getpid(),
        }

    def status(self) -> dict[str, Any]:
        """The identity, the contract, all queries and every client's, as plain data."""
        contract = self.contract(self.planner)
        return {
            **self.identity(),
            "contract": contract.to_dict(),
            "contract_text": contract.lines(),
            "queries": self.log.summary(),
            "clients": [_client_row(client) for client in self._clients() if not client["session"]["observer"]],
        }


class ClientSession:
    """One client's prompt, frames and trajectories. Its exposed methods are ``TrajPlanner``'s, on plain data."""

    def __init__(self, service: PolicyService) -> None:
        self._service = service
        self._planner = service.planner.session()
        self._log = QueryLog()
        self._first_frames = FirstFrames(self._contract())
        self._plan: Plan | None = None  # the last call's
        self._observer = False  # asks how the service is doing, and nothing else

    # -- settings --------------------------------------------------------------------------------------------------

    @expose
    def set_prompt(self, prompt: str) -> None:
        """The instruction from now on."""
        self._planner.set_prompt(prompt)

    @expose
    def set_config(self, config: str | dict) -> None:
        """The name of a dataset the policy was trained on, or a ``DataConfig`` as a dictionary. Forgets frames; the
        contract is the new config's."""
        self._planner.set_config(config)
        self._first_frames = FirstFrames(self._contract())

    @expose
    def get_config(self) -> dict[str, Any]:
        """The ``DataConfig`` as a dictionary."""
        return self._planner.get_config().to_dict()

    @expose
    def set_ensemble_nums(self, n: int) -> None:
        """How many trajectories are blended from now on; 0: none."""
        self._planner.set_ensemble_nums(n)

    @expose
    def set_chunking(self, delay: float | None) -> None:
        """Real-time chunking: freeze ``delay`` (in the frames' clock) of the last chunk; None: off."""
        self._planner.set_chunking(None if delay is None else RealTimeChunking(delay))

    @expose
    def reset(self, seed: int | None = None) -> None:
        """Forget frames and past trajectories; prompt and config stay. With ``seed``, noise begins anew from there."""
        self._planner.reset(seed)
        self._first_frames.restart()

    # -- planning --------------------------------------------------------------------------------------------------

    @expose
    def add_obs_frame(self, obs_frame: dict[str, Any]) -> None:
        """Hand over the newest frame. A ValueError says what is wrong with it; the session is as it was."""
        self._first_frames.check([obs_frame])
        self._planner.add_obs_frame(obs_frame)
        self._first_frames.accept([obs_frame])

    @expose
    def get_action(
        self,
        sample_num: int = 1,
        draw_traj: bool = False,
        compress_traj_img: bool = False,
        steps: int | None = None,
        sampler: str | None = None,
    ) -> tuple | None:
        """Plan from the newest frame: poses, grippers, times and the drawing; None before the first frame."""
        plan = self._infer((None, None, sample_num, draw_traj, compress_traj_img), steps, sampler)
        return None if plan is None else (plan.poses, plan.grippers, plan.times, plan.image)

    @expose
    def run_inference(
        self,
        frames: dict[str, Any] | Sequence[dict[str, Any]] | None = None,
        prompt: str | None = None,
        sample_num: int = 1,
        draw_traj: bool = False,
        compress_traj_img: bool = False,
        steps: int | None = None,
        sampler: str | None = None,
    ) -> dict[str, Any] | None:
        """Frames in, chunk out, in one round trip; see :meth:`apt.infer.planner.TrajPlanner.run_inference`.

        Returns:
            "poses" (S, Ta, Nee, 4, 4), "grippers" (S, Ta, Nee), "times" (Ta,), "image", and "timing" in seconds.
        """
        given = [] if frames is None else list(frames) if isinstance(frames, (list, tuple)) else [frames]
        self._first_frames.check(given, prompt_missing=bool(given) and prompt is None and self._planner.prompt is None)
        plan = self._infer((given, prompt, sample_num, draw_traj, compress_traj_img), steps, sampler)
        self._first_frames.accept(given)
        if plan is None:
            return None
        return {
            "poses": plan.poses,
            "grippers": plan.grippers,
            "times": plan.times,
            "image": plan.image,
            "timing": plan.timing.to_dict(),
        }

    @expose
    def ensemble_traj(
        self, poses: np.ndarray, grippers: np.ndarray, times: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Blend a trajectory of the client's own, (Ta, Nee, 4, 4), (Ta, Nee), (Ta,), into its ensemble."""
        # Copied: what arrives lies in memory that the next call overwrites.
        return self._planner.ensemble_traj(*(np.array(part, np.float64) for part in (poses, grippers, times)))

    def _infer(self, arguments: tuple, steps: int | None, sampler: str | None) -> Plan | None:
        try:
            plan = self._planner.run_inference(*arguments, steps=steps, sampler=sampler)
        except Exception:
            for log in (self._log, self._service.log):
                log.failure()
            raise
        if plan is not None:
            for log in (self._log, self._service.log):
                log.answer(plan.timing)
        self._plan = plan
        return plan

    # -- about the service -----------------------------------------------------------------------------------------

    @expose
    def observation_contract(self) -> dict[str, Any]:
        """What the policy wants to be shown; see :meth:`apt.infer.contract.ObservationContract.to_dict`."""
        return self._contract().to_dict()

    @expose
    def ping(self) -> dict[str, Any]:
        """That the service is there, and which one it is."""
        return self._service.identity()

    @expose
    def status(self) -> dict[str, Any]:
        """How the service is doing; see :meth:`PolicyService.status`."""
        self._observer = self._log.answered + self._log.failed == 0
        return self._service.status()

    def _contract(self) -> ObservationContract:
        return self._service.contract(self._planner)

    # -- for the transport -----------------------------------------------------------------------------------------

    def take_timing(self) -> dict[str, float]:
        """Seconds of the stages of the call that has just ended, to travel with its reply."""
        plan, self._plan = self._plan, None
        return {} if plan is None else plan.timing.to_dict()

    def statistics(self) -> dict[str, Any]:
        """This client's queries."""
        return {**self._log.summary(), "observer": self._observer}


def _client_row(client: dict[str, Any]) -> dict[str, Any]:
    return {
        "id": client["id"],
        "host": client["host"],
        "connected_s": max(0.0, time.time() - client["connected_since"]),
        "shared_memory": client["shared_memory"],
        "running": client["running"],
        **{key: client["session"][key] for key in ("answered", "failed", "per_second", "last_s_ago", "latency_s")},
    }
