"""The interface of an action expert, and all that is the same whatever its architecture.

A pass has two halves, since VLM tokens never see action tokens. ``encode_context`` runs once per observation and keeps
what action tokens attend to; ``denoise`` runs the action tokens against it. Training calls each once, sampling calls
``denoise`` once per denoising step.

An architecture is a subclass: what it reads of the VLM, how it prepares that, its blocks, and its rules for checkpoint
files (docs/architectures.md builds one).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from torch import nn

from apt.model.action_scale import ACTION_DIM, TRANSLATION, full_scale
from apt.model.action_transform import action_to_state, state_to_action
from apt.model.experts.base import (
    RobotState,
    TrainingDraws,
    VLMFeatures,
    VLMReads,
    recentre,
    recentring_transform,
    transform_states,
)
from apt.model.experts.config import ExpertConfig
from apt.model.experts.context import Context, Prefix, SamplingRun, VLContext, repeat_robot
from apt.model.experts.loss import ExpertLoss, action_loss
from apt.model.layers.mlp import MLP
from apt.model.layers.norms import RMSNorm
from apt.model.layers.positions import sinusoidal_embedding
from apt.model.layers.rotations import invert_transform
from apt.model.objectives.base import Guide, solver_step
from apt.model.objectives.registry import make_objective

MAX_ARMS = 4


class Expert(nn.Module, ABC):
    """An action expert.

    Noise is added to, samplers run on, and the network reads and answers scaled actions: ``action / action_scale``.
    History tokens and the positions of tokens are in metres.

    Parameters with no path to the output must not require gradients: data parallelism would wait for theirs.
    """

    #: whether VL tokens run through the blocks with the action tokens
    carries_vl_tokens = False
    #: denoising steps under flow matching, when a call does not say
    flow_steps = 10
    #: ``len(blocks)`` of them, each with ``modulation(time)``
    blocks: nn.ModuleList

    def __init__(self, config: ExpertConfig) -> None:
        """Build everything but the blocks and what VL tokens need."""
        super().__init__()
        self.config = config
        self.objective = make_objective(
            config.objective,
            config.train_timesteps,
            config.inference_timesteps,
            self.flow_steps,
            config.prediction,
        )
        self.register_buffer("action_scale", torch.tensor(full_scale(config.action_scale)), persistent=False)  # (10,)
        width = config.width
        self.history_mlp = MLP(ACTION_DIM - 1, width)
        self.action_mlp = MLP(ACTION_DIM, width)
        self.position_mlp = MLP(3, width, zero_init_last=True)
        self.arm_embedding = nn.Parameter(torch.randn(1, MAX_ARMS, 1, width) * 0.02)
        self.time_mlp = MLP(width, width)
        self.final_norm = RMSNorm(width)
        self.action_head = nn.Linear(width, ACTION_DIM)
        nn.init.zeros_(self.action_head.weight)

    # -- what an architecture defines --------------------------------------------------------------------------------

    @staticmethod
    def num_blocks(config: ExpertConfig) -> int:
        """Number of blocks."""
        return config.num_layers

    @property
    @abstractmethod
    def reads(self) -> VLMReads:
        """What can reach the output, of all that the VLM could give."""

    @abstractmethod
    def encode_vl(self, features: VLMFeatures, robot: RobotState) -> VLContext:
        """What action tokens attend to: all that depends neither on the noisy action nor on the diffusion time.

        Poses are already re-centred. Whatever comes from poses is computed with autocast off.
        """

    @abstractmethod
    def run_blocks(self, x: torch.Tensor, context: VLContext, modulations: torch.Tensor) -> torch.Tensor:
        """Action tokens (B, Nee * (Th + Ta), h), arm-major, after all blocks; ``modulations`` (blocks, B or 1, 4,
        h)."""

    def fusion_gates(self) -> list[tuple[int, str, nn.Parameter]]:
        """Gates between VLM and expert, in the order of the layers, for pictures: feature, what it is, values (h,)."""
        return []

    def bare_parameters(self) -> list[nn.Parameter]:
        """Parameters that a forward pass reads otherwise than by calling the layer that owns them."""
        return [self.arm_embedding]

    # -- checkpoint rules, for architectures with names or an expansion of their own -----------------------------------

    @staticmethod
    def to_file(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """A state dict's tensors under the names of checkpoint files."""
        return dict(state)

    @staticmethod
    def from_file(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Inverse of :meth:`to_file`."""
        return dict(weights)

    @staticmethod
    def expand_va(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """A VA prior's tensors under the names they take in the VLA; both of files."""
        return dict(weights)

    # -- public: training and sampling ---------------------------------------------------------------------------------

    def draw(
        self,
        robot: RobotState,
        pose_noise: bool = False,
        noise_samples: int = 1,
        generator: torch.Generator | None = None,
    ) -> TrainingDraws:
        """Random numbers of a training pass; see :meth:`apt.model.experts.base.TrainingDraws.draw`."""
        return TrainingDraws.draw(robot, self.config.num_future, self.objective, pose_noise, noise_samples, generator)

    def forward(
        self,
        features: VLMFeatures,
        robot: RobotState,
        future: torch.Tensor,
        draws: TrainingDraws,
        gripper_mask: torch.Tensor | None = None,
    ) -> ExpertLoss:
        """Training loss on future states (B, Ta, Nee, 17) in the world frame."""
        with torch.autocast(future.device.type, enabled=False):
            centred_from_world = recentring_transform(features, draws.world_quaternion)
            features, robot = recentre(features, robot, centred_from_world)
            future = transform_states(centred_from_world, future)
            clean = self.encode_states(future, robot)  # (B, Nee, Ta, 10): from the clean pose, noise is for inputs
            samples = len(draws.noise) // len(clean)
            clean = clean.repeat_interleave(samples, 0) / self.action_scale
            target = self.objective.target(clean, draws.noise, draws.timestep)
            noisy = self.objective.add_noise(clean, draws.noise, draws.timestep)
            if draws.ee_noise is not None:
                world_from_ee = robot.world_from_ee.clone()
                world_from_ee[..., :3, 3] += draws.ee_noise
                robot = RobotState(world_from_ee, robot.world_from_ref, robot.history, robot.valid_ee)
        context = self.encode_context(features, robot, draws.history_noise).for_draws(samples)
        predicted = self.denoise(context, noisy, self.modulations(draws.timestep))
        arms = [None if mask is None else mask.repeat_interleave(samples, 0) for mask in (robot.valid_ee, gripper_mask)]
        return action_loss(self.objective.error(predicted, target), *arms)

    def predict(
        self,
        features: VLMFeatures,
        robot: RobotState,
        noise: torch.Tensor,
        steps: int | None = None,
        sampler: str | None = None,
    ) -> torch.Tensor:
        """Sampled future states (B * S, Ta, Nee, 17) in the world frame, from ``noise`` (B * S, Nee, Ta, 10)."""
        prefix = self.encode_prefix(features, robot, len(noise) // len(robot.world_from_ee))
        return self.decode(prefix, self.sample(prefix.context, noise, self.sampling_run(steps, sampler)))

    # -- sampling, stage by stage --------------------------------------------------------------------------------------

    def encode_prefix(self, features: VLMFeatures, robot: RobotState, samples: int = 1) -> Prefix:
        """All that comes before denoising, for ``samples`` noisy actions per observation, side by side."""
        with torch.autocast(robot.history.device.type, enabled=False):  # half precision would round positions
            centred_from_world = recentring_transform(features)
            features, robot = recentre(features, robot, centred_from_world)
            world_from_centred = invert_transform(centred_from_world)
        context = self.encode_context(features, robot).repeat_interleave(samples).with_buffers()
        if samples > 1:
            world_from_centred = world_from_centred.repeat_interleave(samples, 0)
        return Prefix(context, repeat_robot(robot, samples), world_from_centred)

    def sampling_run(self, steps: int | None = None, sampler: str | None = None) -> SamplingRun:
        """What every sampling by ``sampler`` in ``steps`` shares (None: the objective's own)."""
        schedule = self.objective.schedule(steps, sampler).to(self.arm_embedding.device)
        modulations = self.modulations(schedule.timesteps)  # (blocks, steps, 4, h), of all steps at once
        return SamplingRun(modulations.transpose(0, 1).unsqueeze(2).contiguous(), schedule.coefficients)

    def sample(
        self, context: Context, noise: torch.Tensor, run: SamplingRun, guide: Guide | None = None, step=None
    ) -> torch.Tensor:
        """Scaled actions (B, Nee, Ta, 10) denoised from ``noise``.

        Args:
            guide: its actions are not scaled.
            step: replaces :meth:`denoise_step` (compiled).
        """
        step = self.denoise_step if step is None else step
        if guide is not None:  # clean actions are blended, which is linear: in scaled numbers as in metres
            guide = Guide(guide.target / self.action_scale, guide.weight)
        x, clean = noise, torch.zeros_like(noise)
        for modulations, coefficients in zip(run.modulations, run.coefficients, strict=True):
            x, clean = step(context, x, clean, modulations, coefficients, guide)
        return x

    def denoise_step(
        self,
        context: Context,
        x: torch.Tensor,
        previous: torch.Tensor,
        modulations: torch.Tensor,
        coefficients: torch.Tensor,
        guide: Guide | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The network and one :func:`apt.model.objectives.base.solver_step`."""
        return solver_step(x, self.denoise(context, x, modulations), previous, coefficients, guide)

    def decode(self, prefix: Prefix, scaled: torch.Tensor) -> torch.Tensor:
        """Scaled actions (B, Nee, Ta, 10) as states (B, Ta, Nee, 17) in the world frame."""
        action = scaled * self.action_scale
        with torch.autocast(action.device.type, enabled=False):
            references = prefix.robot.world_from_ee[:, None], prefix.robot.world_from_ref[:, None]
            return transform_states(prefix.world_from_centred, action_to_state(action.transpose(1, 2), *references))

    # -- the two halves of a pass --------------------------------------------------------------------------------------

    def encode_context(
        self, features: VLMFeatures, robot: RobotState, history_noise: torch.Tensor | None = None
    ) -> Context:
        """All that denoising is given. Poses are already re-centred; ``history_noise`` is (B, Nee, Th, 9)."""
        with torch.autocast(robot.world_from_ee.device.type, enabled=False):
            ref_from_ee = invert_transform(robot.world_from_ref) @ robot.world_from_ee
            history = self.encode_states(robot.history, robot)[..., : ACTION_DIM - 1]  # (B, Nee, Th, 9)
        position = ref_from_ee[..., :3, 3].unsqueeze(2)  # (B, Nee, 1, 3)
        if history_noise is not None:
            history = history + history_noise
        tokens = self.history_mlp(history) + self.position_mlp(position + history[..., TRANSLATION])
        arms, steps = tokens.shape[1:3]
        return Context(
            vl=self.encode_vl(features, robot),
            history=tokens + self._identity(arms, 0, steps),
            future_identity=self._identity(arms, steps, self.config.num_future),
            ref_from_ee_position=position,
        )

    def denoise(self, context: Context, noisy: torch.Tensor, modulations: torch.Tensor) -> torch.Tensor:
        """The prediction (B, Nee, Ta, 10) for noisy scaled actions; ``modulations`` (blocks, B or 1, 4, h)."""
        metres = noisy[..., TRANSLATION].detach() * self.action_scale[TRANSLATION]
        position = context.ref_from_ee_position + metres
        future = self.action_mlp(noisy) + self.position_mlp(position) + context.future_identity
        x = torch.cat([context.history, future], dim=2)  # (B, Nee, Th + Ta, h)
        arms, steps = x.shape[1:3]
        x = self.run_blocks(x.flatten(1, 2), context.vl, modulations)
        x = x.unflatten(1, (arms, steps))[:, :, self.config.num_history :]
        return self.action_head(self.final_norm(x)).float()

    def modulations(self, timestep: torch.Tensor) -> torch.Tensor:
        """What the diffusion times (B,) do to each block's norms, (blocks, B, 4, h)."""
        time = self.time_mlp(sinusoidal_embedding(timestep, self.config.width))
        return torch.stack([block.modulation(time) for block in self.blocks])

    # -- tokens --------------------------------------------------------------------------------------------------------

    @staticmethod
    def encode_states(states: torch.Tensor, robot: RobotState) -> torch.Tensor:
        """States (B, T, Nee, 17) as actions (B, Nee, T, 10)."""
        action = state_to_action(states, robot.world_from_ee[:, None], robot.world_from_ref[:, None])
        return action.transpose(1, 2)

    def _identity(self, arms: int, first_step: int, steps: int) -> torch.Tensor:
        """Which arm, and if configured which step, tokens are: (1, arms, 1 or steps, h)."""
        identity = self.arm_embedding[:, :arms]
        if self.config.action_step_embedding:
            index = torch.arange(first_step, first_step + steps, device=identity.device)
            identity = identity + sinusoidal_embedding(index, self.config.width)
        return identity

    @property
    def steps_per_arm(self) -> int:
        """Th + Ta, action tokens of an arm."""
        return self.config.num_history + self.config.num_future
