"""The policy: a VLM and an action expert; loss in training, states at inference."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import nn

from apt.model.action_scale import ACTION_DIM
from apt.model.config import VLAConfig
from apt.model.experts.base import RobotState, VLMFeatures
from apt.model.experts.loss import ExpertLoss
from apt.model.experts.registry import get_architecture
from apt.model.language_loss import LanguageLoss
from apt.model.pretrained import CheckpointMismatch, LoadReport, Origin, VLMPlaces, plan_load
from apt.model.state_dict_adapter import vlm_from_released, vlm_to_released
from apt.model.vlm import VLM
from data_utils.types import Batch, Observation


class VLA(nn.Module):
    """Vision-language-action policy.

    Args:
        config: what to build.
        frozen_dtype, trained_dtype: of the VLM's parameters that do not train and that do.
        random_vlm: build the VLM from its configuration with random weights.
    """

    def __init__(
        self,
        config: VLAConfig,
        frozen_dtype: torch.dtype = torch.float32,
        trained_dtype: torch.dtype = torch.float32,
        random_vlm: bool = False,
    ) -> None:
        super().__init__()
        self.config = config
        self.expert = get_architecture(config.arch)(config.expert_config())
        self.vlm = VLM(
            config.vlm,
            mode=config.vlm_mode,
            layer_stride=config.vlm_layer_stride,
            reads=self.expert.reads,
            vision_only=config.train_stage == 0,
            frozen_dtype=frozen_dtype,
            trained_dtype=trained_dtype,
            random_weights=random_vlm,
            language_modelling=config.lm_loss_weight > 0,
        )
        trained = {name: p for name, p in self.vlm.qwen.named_parameters() if p.requires_grad}
        self._tuned_vlm_names, self._trained_vlm_names = set(trained), tuple(vlm_to_released(trained))
        if config.gradient_checkpointing and config.vlm_mode != "frozen":
            self.vlm.qwen.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    # -- training and inference ------------------------------------------------------------------------------------

    def forward(
        self,
        batch: Batch,
        generator: torch.Generator | None = None,
        pose_noise: bool = False,
        camera_view_dropout: float = 0.0,
        noise_samples: int = 1,
        features: VLMFeatures | None = None,
    ) -> ExpertLoss:
        """Training loss of a batch on the model's device.

        Args:
            generator: source of every random number; None: torch's global one.
            pose_noise: perturb proprioceptive inputs.
            camera_view_dropout: probability with which a sample of two or more cameras loses one.
            noise_samples: diffusion draws per sample, which share everything that the draw does not change.
            features: of the batch, where they are known already: the VLM is not run, and no camera may be dropped.
        """
        observation = batch.observation
        robot = robot_state(observation)
        draws = self.expert.draw(robot, pose_noise, noise_samples, generator)
        texts: list[LanguageLoss | None] = []
        if features is None:
            keep = None
            if camera_view_dropout > 0:
                keep = draw_camera_keep(observation.camera_mask, camera_view_dropout, generator)
            if self.config.lm_loss_weight > 0:
                features, *texts = self.vlm.features_and_language_loss(batch, keep)
            else:
                features = self.vlm(observation, keep)
        if self.config.knowledge_insulation:
            features = features.detached()
        loss = self.expert(features, robot, batch.future, draws, batch.gripper_mask)
        return add_language_loss(loss, *texts, self.config.lm_loss_weight) if texts else loss

    @torch.no_grad()
    def predict(
        self,
        observation: Observation,
        noise: torch.Tensor | None = None,
        steps: int | None = None,
        generator: torch.Generator | None = None,
        sampler: str | None = None,
    ) -> torch.Tensor:
        """Sampled future states (B, Ta, Nee, 17) in the world frame.

        Args:
            noise: (B, Nee, Ta, 10) to denoise from; None: drawn from ``generator``.
            steps, sampler: see :meth:`apt.model.objectives.base.Objective.schedule`.
        """
        robot = robot_state(observation)
        if noise is None:
            shape = (*robot.valid_ee.shape, self.config.num_future, ACTION_DIM)
            noise = torch.randn(shape, device=robot.history.device, generator=generator)
        return self.expert.predict(self.vlm(observation), robot, noise, steps, sampler)

    def bare_parameters(self) -> list[nn.Parameter]:
        """Parameters that a forward pass reads otherwise than by calling the layer that owns them.

        A back-end that shards parameters finds the others by those calls; these it must be told about.
        """
        patches = self.vlm.qwen.model.visual.patch_embed.proj
        return [*self.expert.bare_parameters(), *patches.parameters()]

    # -- checkpoints -----------------------------------------------------------------------------------------------

    def released_parameters(self) -> list[nn.Parameter]:
        """The parameters that :meth:`released_weights` and :meth:`released_vlm_weights` read."""
        tuned = [p for name, p in self.vlm.qwen.named_parameters() if name in self._tuned_vlm_names]
        return [*self.expert.parameters(), *tuned]

    def released_weights(self) -> dict[str, torch.Tensor]:
        """The expert under the names of checkpoint files."""
        return self.expert.to_file(self.expert.state_dict())

    def released_vlm_weights(self) -> dict[str, torch.Tensor]:
        """What of the VLM differs from its published weights, under released names: what this run trains, and what
        the checkpoint it started from had trained. Empty for a VLM that was never tuned."""
        parameters = self.vlm.qwen.named_parameters()
        return vlm_to_released({name: p.detach() for name, p in parameters if name in self._tuned_vlm_names})

    @property
    def origin(self) -> Origin:
        """What a checkpoint of this policy says of itself."""
        return Origin(self.config.arch, self.config.train_stage)

    def file_content(self) -> dict:
        """What a checkpoint says of this policy and holds of it: the entries that :meth:`load` reads."""
        tuned = self.released_vlm_weights()
        return {
            **self.origin.entries(),
            "weights": self.released_weights(),
            **({"vlm_weights": tuned} if tuned else {}),
            "vlm_tensors": len(tuned),
            "vlm_fingerprint": self.vlm.fingerprint,
        }

    def load(self, content: Mapping) -> None:
        """Load a checkpoint of this very configuration. Raises :class:`CheckpointMismatch`, model unchanged."""
        self._take(content["weights"], content, self.plan(content))

    def start_from(self, content: Mapping, load_from_va: bool = False, any_vlm: bool = True) -> LoadReport:
        """Start from a checkpoint, whose VLM may have been tuned otherwise than this one's will be.

        Args:
            content: of the file.
            load_from_va: expand a VA prior into a VLA, by the architecture's rule: in APT its block i becomes block
                2i + 1, even blocks stay fresh, every other tensor is copied.
            any_vlm: take it too where it was trained on a VLM of other published weights; the report says so.
        Raises:
            CheckpointMismatch: another size, architecture or stage than asked for, tensors that are missing or hold
                numbers that are not finite; the model is unchanged.
        """
        report = self.plan(content, load_from_va, any_mode=True, any_vlm=any_vlm)
        weights = content["weights"]
        return self._take(self.expert.expand_va(weights) if load_from_va else weights, content, report)

    def plan(
        self, content: Mapping, load_from_va: bool = False, any_mode: bool = False, any_vlm: bool = False
    ) -> LoadReport:
        """What loading would do, and why it would be refused; changes nothing.

        Args:
            any_mode: the file may be of a model whose VLM trained in another mode. For the others see
                :meth:`start_from`.
        """
        target = vlm_to_released(self.vlm.qwen.state_dict())
        read = tuple(vlm_to_released(dict.fromkeys(self.vlm.read_names)))
        places = VLMPlaces(target, self._trained_vlm_names, read, self.vlm.fingerprint, any_mode, any_vlm)
        return plan_load(content, self.config.arch, self.expert.config, load_from_va, places)

    def _take(self, weights: dict[str, torch.Tensor], content: Mapping, report: LoadReport) -> LoadReport:
        if report.problem is not None:
            raise CheckpointMismatch(report.problem)
        self.expert.load_state_dict(self.expert.from_file(weights), strict=False)
        if vlm_weights := content.get("vlm_weights"):
            tuned = vlm_from_released(vlm_weights)
            self.vlm.qwen.load_state_dict(tuned, strict=False)
            self._tuned_vlm_names |= set(tuned)
        return report


def add_language_loss(loss: ExpertLoss, prompts: LanguageLoss, pairs: LanguageLoss | None, weight: float) -> ExpertLoss:
    """With ``weight`` times the mean over all predicted tokens, of prompts and of pairs alike, in its total."""
    text = prompts if pairs is None else prompts + pairs
    pairs_mean = None if pairs is None else pairs.mean.detach()
    return dataclasses.replace(loss, total=loss.total + weight * text.mean, lm=text.mean.detach(), lm_pairs=pairs_mean)


def robot_state(observation: Observation) -> RobotState:
    return RobotState(observation.world_from_ee, observation.world_from_ref, observation.history, observation.valid_ee)


def draw_camera_keep(
    camera_mask: torch.Tensor, probability: float, generator: torch.Generator | None = None
) -> torch.Tensor:
    """(B, Ncam) bool, False for a camera to hide: with ``probability``, one of a sample's two or more shown ones."""
    device, batch = camera_mask.device, len(camera_mask)
    drops = torch.rand(batch, device=device, generator=generator) < probability
    drops &= camera_mask.sum(1) >= 2
    score = torch.rand(camera_mask.shape, device=device, generator=generator)
    victim = torch.where(camera_mask, score, -1.0).argmax(1, keepdim=True)
    return ~(torch.zeros_like(camera_mask).scatter_(1, victim, True) & drops.unsqueeze(1))
