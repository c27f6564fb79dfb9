"""What denoising is given: all that depends neither on the noisy action nor on the diffusion time."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

from apt.model.experts.base import RobotState
from apt.model.layers.attention import AttentionMask
from apt.model.layers.positions import PoseEncoding, RotaryEncoding
from data_utils.types import map_tensors

Encoding = RotaryEncoding | PoseEncoding


@dataclass
class KeysValues:
    """A block's keys and values of the VL tokens, (B, L, heads, d) each."""

    keys: torch.Tensor
    values: torch.Tensor

    def joined(self, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """With those of action tokens (B, A, heads, d) behind them: (B, L + A, heads, d)."""
        return torch.cat([self.keys, k], dim=1), torch.cat([self.values, v], dim=1)

    def with_room(self, tokens: int) -> "KeysValuesBuffer":
        """The same with room for ``tokens`` action tokens, which every call of ``joined`` writes over."""
        batch, length, heads, width = self.keys.shape
        both = self.keys.new_empty(2, batch, length + tokens, heads, width)
        both[0, :, :length], both[1, :, :length] = self.keys, self.values
        return KeysValuesBuffer(both[0], both[1], length)


@dataclass
class KeysValuesBuffer:
    """As :class:`KeysValues`, (B, L + A, heads, d) each, for sampling: nothing is copied but the action tokens'."""

    keys: torch.Tensor
    values: torch.Tensor
    length: int

    def joined(self, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.keys[:, self.length :] = k
        self.values[:, self.length :] = v
        return self.keys, self.values


@dataclass
class VLContext:
    """What action tokens attend to, in the form that an architecture wants; a subclass holds tensors of batch first,
    lists of them, and dataclasses of them."""

    def for_draws(self, draws: int) -> "VLContext":
        """For ``draws`` noisy actions per sample in training, side by side."""
        return _repeated(self, draws)

    def with_buffers(self) -> "VLContext":
        """For sampling, where the same keys and values meet those of new action tokens at every step."""
        return self


@dataclass
class JointContext(VLContext):
    """For blocks whose action tokens attend to VL tokens and to each other at once.

    A batch of action tokens may be a multiple of that of the VL tokens (:meth:`for_draws`): A then counts the tokens of
    all draws of a sample.
    """

    keys_values: list[KeysValues | KeysValuesBuffer]  # per block
    masks: list[AttentionMask]  # per block, of action queries: (B, 1, A, L + A)
    encodings: list[Encoding]  # per block, of action tokens

    def for_draws(self, draws: int) -> "JointContext":
        """Draws share keys and values, which are most of what training reads and writes: a sample's action tokens of
        all draws attend in one call, to VL tokens and to those of their own draw."""
        length = self.keys_values[0].keys.shape[1]
        masks = {id(mask): mask.for_draws(draws, length) for mask in self.masks}  # blocks share masks and encodings
        encodings = {id(one): map_tensors(one, lambda x: torch.cat([x] * draws, dim=1)) for one in self.encodings}
        return JointContext(
            self.keys_values, [masks[id(mask)] for mask in self.masks], [encodings[id(one)] for one in self.encodings]
        )

    def with_buffers(self) -> "JointContext":
        tokens = self.masks[0].bias.shape[-1] - self.keys_values[0].keys.shape[1]
        return dataclasses.replace(self, keys_values=[block.with_room(tokens) for block in self.keys_values])


@dataclass
class Context:
    """What denoising is given: what action tokens attend to, and what of themselves is known beforehand."""

    vl: VLContext
    history: torch.Tensor  # (B, Nee, Th, h), history tokens
    future_identity: torch.Tensor  # (1, Nee, 1 or Ta, h), which arm and step a future token is
    ref_from_ee_position: torch.Tensor  # (B, Nee, 1, 3)

    def repeat_interleave(self, times: int) -> "Context":
        """For ``times`` noisy actions per sample, side by side: every B becomes B * times."""
        return self if times == 1 else self._with(_repeated(self.vl, times), times)

    def for_draws(self, draws: int) -> "Context":
        """As :meth:`repeat_interleave`, for training: what action tokens attend to need not be repeated."""
        return self if draws == 1 else self._with(self.vl.for_draws(draws), draws)

    def _with(self, vl: VLContext, times: int) -> "Context":
        own = (_repeated(value, times) for value in (self.history, self.ref_from_ee_position))
        return Context(vl, next(own), self.future_identity, next(own))

    def with_buffers(self) -> "Context":
        """See :meth:`VLContext.with_buffers`."""
        return dataclasses.replace(self, vl=self.vl.with_buffers())


@dataclass
class Prefix:
    """A query up to the denoising loop."""

    context: Context
    robot: RobotState  # re-centred
    world_from_centred: torch.Tensor  # (B, 4, 4)


@dataclass
class SamplingRun:
    """A schedule and everything that follows from it and the weights alone; made once, on the device."""

    modulations: torch.Tensor  # (steps, blocks, 1, 4, h), see ``Expert.modulations``
    coefficients: torch.Tensor  # (steps, 5), see ``apt.model.objectives.base.Schedule``

    def __len__(self) -> int:
        return len(self.coefficients)


def repeat_robot(robot: RobotState, times: int) -> RobotState:
    """Every sample's state ``times`` times, side by side."""
    return robot if times == 1 else _repeated(robot, times)


def _repeated(value, times: int):
    """Blocks share masks and encodings: what is shared is repeated once."""
    return map_tensors(value, lambda tensor: tensor.repeat_interleave(times, 0))
