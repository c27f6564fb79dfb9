"""The observation contract: what a policy wants to be shown, as plain data, and how a client's frames differ from it.

A robot that sends the wrong cameras, arms or clock would get motions that look almost right. So the service publishes
what the policy was trained with, and refuses a client whose first frame does not fit, with everything that differs in
one message.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from apt.infer.frames import ENCODINGS, parse_arms, parse_camera, parse_time
from data_utils.config import DataConfig

_FASTEST_CLOCK = 0.1  # of the trained time step: frames that come quicker are in another unit


class ContractError(ValueError):
    """Observations that do not meet the contract; the message lists everything that differs."""


@dataclass(frozen=True)
class ObservationContract:
    """What a policy with sampling rules ``config`` wants to be shown."""

    config: DataConfig
    follows_prompt: bool = True
    """False: a VA prior, which wants an instruction but does not listen to it."""

    # -- as data ---------------------------------------------------------------------------------------------------

    @property
    def time_step(self) -> float | None:
        """See :attr:`data_utils.config.DataConfig.time_step`."""
        return self.config.time_step

    @property
    def time_unit(self) -> str:
        """See :attr:`data_utils.config.DataConfig.time_unit`."""
        return self.config.time_unit

    @property
    def chunk_length(self) -> float | None:
        """From a frame to its chunk's end, in the frames' clock; None: measured from the frames."""
        step, config = self.time_step, self.config
        return None if step is None else config.num_future * config.sample_state_gaps * step

    @property
    def steps_back(self) -> int:
        """Time steps before the newest frame that the policy looks at; 0: the newest frame is enough."""
        config = self.config
        return max(
            (config.num_obs - 1) * config.sample_camera_gaps,
            (config.num_history - 1) * config.sample_state_gaps,
        )

    def to_dict(self) -> dict[str, Any]:
        """Dictionaries, lists, texts and numbers alone: what a client without this library can read."""
        config = self.config
        return {
            "cameras": [
                {
                    "name": name,
                    "mount": "wrist" if name in config.wrist_cameras else "fixed",
                    "trained_height_width": list(config.image_hw),
                }
                for name in config.cameras
            ],
            "images": {
                "dtype": "uint8",
                "channels": 3,
                "encodings": list(ENCODINGS),
                "any_size": True,  # letterboxed to trained_height_width
            },
            "arms": {"fewest": 1, "most": config.num_arms},
            "gripper": {"closed": 0.0, "open": 1.0},
            "clock": {"unit": self.time_unit, "time_step": self.time_step},
            "history": {
                "images": config.num_obs,
                "states": config.num_history,
                "time_steps_back": self.steps_back,
                "fewest_frames": 1 if self.time_step is not None else 2,
            },
            "future": {"states": config.num_future, "time_steps_between": config.sample_state_gaps},
            "prompt": {"needed": True, "followed": self.follows_prompt},
        }

    def lines(self) -> list[str]:
        """For people."""
        config = self.config
        height, width = config.image_hw
        unit = self.time_unit.removesuffix("s") if self.time_step == 1 else self.time_unit
        step = "measured from the frames" if self.time_step is None else f"{self.time_step:.4g} {unit}"
        looks = f"looks {self.steps_back} time steps back" if self.steps_back else "looks at the newest frame alone"
        arms = "1 arm" if config.num_arms == 1 else f"1 to {config.num_arms} arms"
        cameras = ", ".join(f"{c} (wrist)" if c in config.wrist_cameras else c for c in config.cameras)
        return [
            f"cameras: {cameras}; images of any size, trained at {width}x{height}",
            f"{arms}; time step {step}; {looks}",
            f"answers with {config.num_future} poses, {config.sample_state_gaps} time steps apart; "
            + ("follows the prompt" if self.follows_prompt else "wants a prompt but does not follow it"),
        ]

    # -- against frames --------------------------------------------------------------------------------------------

    def differences(self, obs_frame: Any) -> list[str]:
        """Everything about a frame that does not meet the contract, a line each; none: it does."""
        if not isinstance(obs_frame, dict):
            return [f"the frame is a {type(obs_frame).__name__}; wanted a dictionary"]
        checks = [lambda name=name: parse_camera(name, obs_frame.get(name)) for name in self.config.cameras]
        checks += [lambda: parse_arms(obs_frame, self.config), lambda: parse_time(obs_frame)]
        found = []
        for check in checks:
            try:
                check()
            except ValueError as error:
                found.append(str(error))
        wanted = ", ".join(self.config.cameras)
        for name, value in obs_frame.items():
            # Only what looks like a camera: a robot's own notes in a frame do no harm.
            if isinstance(value, dict) and name not in self.config.cameras:
                found.append(f"camera {name!r} is not one the policy was trained with; wanted {wanted}")
        return found

    def clock_difference(self, first: float, second: float) -> str | None:
        """What two successive timestamps say about the client's clock; None: nothing against it.

        Robots may send frames more or less often than the recordings had them. But a gap longer than the whole chunk,
        or a small part of a time step, is that of a clock in another unit.
        """
        step, gap = self.time_step, second - first
        if step is None or gap <= 0:  # time going backwards is the planner's to refuse
            return None
        shortest = step if self.time_unit == "control steps" else _FASTEST_CLOCK * step
        longest = self.chunk_length
        # Timestamps are numbers like 1.7e9: their last digits are lost in the difference.
        slack = 1e-6 * shortest + 8 * math.ulp(max(abs(first), abs(second)))
        if shortest - slack <= gap <= longest + slack:
            return None
        return (
            f"timestamp: the first two frames are {gap:.6g} apart; the policy's clock counts {self.time_unit}, its "
            f"time step is {step:.6g}; wanted gaps from {shortest:.6g} to {longest:.6g} (after a pause: reset() first)"
        )


class FirstFrames:
    """Holds one client's frames against the contract until two have met it.

    Call :meth:`check` before a frame is used, and :meth:`accept` when it was.
    """

    def __init__(self, contract: ObservationContract) -> None:
        self.contract = contract
        self._times: list[float] = []

    def check(self, obs_frames: Sequence[Any], prompt_missing: bool = False) -> None:
        """Refuse frames that do not fit.

        Args:
            obs_frames: the client's next frames, oldest first.
            prompt_missing: a query comes with them, and there is no instruction for it.
        Raises:
            ContractError: lists everything that differs.
        """
        found = []
        if not self._times and obs_frames:
            found = self.contract.differences(obs_frames[0])
        if not found and len(self._times) < 2:
            found = self._clock_differences(obs_frames)
        if prompt_missing:
            found.append("prompt: there is none yet; give one, or call set_prompt first")
        if found:
            listed = "".join(f"\n  - {line}" for line in found)
            raise ContractError(
                f"the observation does not meet this policy's contract:{listed}\n"
                "observation_contract() says what is wanted; set_config() chooses another of the policy's robots"
            )

    def accept(self, obs_frames: Sequence[dict[str, Any]]) -> None:
        """The planner took the frames."""
        self._times += [parse_time(frame) for frame in obs_frames[: 2 - len(self._times)]]

    def restart(self) -> None:
        """A new episode: the clock may jump, so a single frame of the last one tells nothing."""
        if len(self._times) < 2:
            self._times.clear()

    def _clock_differences(self, obs_frames: Sequence[Any]) -> list[str]:
        try:
            times = (self._times + [parse_time(frame) for frame in obs_frames[:2]])[:2]
        except ValueError:
            return []  # no usable timestamp: the planner names it
        found = self.contract.clock_difference(*times) if len(times) == 2 else None
        return [found] if found else []
