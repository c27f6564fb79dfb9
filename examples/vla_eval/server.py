"""A policy as vla-eval asks for it: a model server of its own protocol.

    python -m examples.vla_eval.server --args.ckpt assets/policy --host 127.0.0.1 --port 8000

LIBERO sends mirrored images and no calibration: images are turned back, and where the cameras stand is known for its
suites. The server asks LIBERO for the wrist camera, the arm's state and absolute actions. ``--args.profile FILE`` says
what another benchmark's observations are (docs/integrations.md); its actions are the profile's then.
"""

from __future__ import annotations

import functools
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from vla_eval.model_servers.base import SessionContext
from vla_eval.model_servers.predict import PredictModelServer
from vla_eval.model_servers.serve import run_server
from vla_eval.specs import GRIPPER_CLOSE_POS, IMAGE_RGB, LANGUAGE, POSITION_DELTA, RAW, ROTATION_AA, DimSpec

from apt.infer.openpi_profile import ProfileReader
from apt.infer.serving import ServedPolicy
from data_utils.geometry.resample import at_control_steps
from examples.libero.rollout import EpisodeKey
from examples.vla_eval.observations import CALIBRATION, absolute_rows, frame_of, libero_scene

LIBERO = "libero"
POSITION_ABSOLUTE = DimSpec("position", 3, "absolute_xyz", description="m in MuJoCo's world")


class AptModelServer(PredictModelServer):
    """One policy; each of the harness's sessions has a planner of its own.

    Args:
        ckpt: a run's .pt, an exported folder, or org/name[@revision] of the Hub.
        profile: libero, or a YAML file whose keys are the observation's, ``images/NAME`` for the images.
        execute_steps: rows of a chunk that are executed before the policy is asked again.
        ensemble: trajectories that are averaged; 0: the newest alone.
        steps: denoising steps; None: the planner's default.
        ema: use the averaged weights.
        device: cpu, cuda or cuda:N; None: the first GPU where there is one.
        seed: of the run: each episode's noise follows from it, its suite, task and number.
        max_batch_size: sessions that share a pass of the policy at most; max_wait_time: s that it waits for them.
    Raises:
        ValueError: a checkpoint or a profile that is of no use.
    """

    def __init__(
        self,
        *,
        ckpt: str,
        profile: str = LIBERO,
        execute_steps: int = 4,
        ensemble: int = 2,
        steps: int | None = None,
        ema: bool = False,
        device: str | None = None,
        seed: int = 0,
        max_batch_size: int = 1,
        max_wait_time: float = 0.01,
    ) -> None:
        super().__init__(chunk_size=execute_steps, max_batch_size=max_batch_size, max_wait_time=max_wait_time)
        served = ServedPolicy(
            Path(ckpt),
            ensemble=ensemble,
            ema=ema,
            device=device,
            steps=steps,
            seed=seed,
            max_batch=max_batch_size,
            max_wait_ms=1e3 * max_wait_time,
        ).named()
        served.check()
        served.check_model()
        self._profile, self._seed = profile, seed
        if profile != LIBERO:
            self._reader(profile)
        self._planner, _ = served.load()
        self._sessions: dict[str, _Session] = {}
        self._threads = ThreadPoolExecutor(max(1, max_batch_size))

    # -- what the harness asks ----------------------------------------------------------------------------------------

    async def on_episode_start(self, config: dict[str, Any], ctx: SessionContext) -> None:
        await super().on_episode_start(config, ctx)
        task = config.get("task", {})
        session = self._sessions.get(ctx.session_id)
        planner = session.planner if session is not None else self._planner.session()
        key = EpisodeKey(
            str(task.get("suite", "")), int(task.get("task_id", 0)), int(task.get("episode_idx", 0)), self._seed
        )
        planner.reset(key.derived_seed("policy"))
        self._sessions[ctx.session_id] = _Session(planner, key)

    def predict_batch(self, obs_batch: list[dict[str, Any]], ctx_batch: list[SessionContext]) -> list[dict[str, Any]]:
        """Each session's rows; those that ask together share the policy's passes."""
        return list(self._threads.map(self.predict, obs_batch, ctx_batch))

    def predict(self, obs: dict[str, Any], ctx: SessionContext) -> dict[str, Any]:
        """Rows (execute_steps, 7). Raises ``ValueError``, which fails the episode and goes into the harness's log."""
        session = self._sessions[ctx.session_id]
        reader = self._reader(self._profile if self._profile != LIBERO else session.libero_profile(obs))
        frame = frame_of(obs, reader, ctx.step)
        planner = session.planner
        planner.set_prompt(str(obs["task_description"]))
        planner.add_obs_frame(frame)
        answer = planner.get_action()
        poses, openness, times = (np.asarray(part, np.float64) for part in answer[:3])
        poses, openness = at_control_steps(frame["timestamp"], times, poses[0, :, 0], openness[0, :, 0])
        if self._absolute:
            return {"actions": absolute_rows(poses, openness)}
        return {"actions": reader.deltas(np.asarray(frame["ee_pose"][0]), poses, openness)}

    def get_observation_params(self) -> dict[str, Any]:
        wanted = {"send_wrist_image": True, "send_state": True}
        return wanted | ({"absolute_action": True} if self._absolute else {})

    def get_action_spec(self) -> dict[str, DimSpec]:
        position = POSITION_ABSOLUTE if self._absolute else POSITION_DELTA
        return {"position": position, "rotation": ROTATION_AA, "gripper": GRIPPER_CLOSE_POS}

    def get_observation_spec(self) -> dict[str, DimSpec]:
        return {"agentview": IMAGE_RGB, "language": LANGUAGE, "state": RAW}

    @property
    def _absolute(self) -> bool:
        return self._profile == LIBERO

    @staticmethod
    @functools.lru_cache(maxsize=8)
    def _reader(profile: str) -> ProfileReader:
        return ProfileReader(profile)


class _Session:
    """One of the harness's, in its present episode."""

    def __init__(self, planner, key: EpisodeKey) -> None:
        self.planner, self._key = planner, key

    def libero_profile(self, obs: dict[str, Any]) -> str:
        # Where the observation tells where the cameras are, it does not matter which scene's they would be.
        scene = "floor" if CALIBRATION in obs else libero_scene(self._key.suite, self._key.task_id)
        return f"{LIBERO}:{scene}"


def main() -> None:
    if not any(word.partition("=")[0] in ("--host", "--address", "--config") for word in sys.argv[1:]):
        sys.argv += ["--host", "127.0.0.1"]  # the harness's own default is open to everybody
    run_server(AptModelServer)


if __name__ == "__main__":
    main()
