"""Token insertion, the ablation of gated fusion: VL tokens enter at the input only.

Everything else is as in APT. The VL stream starts from the residual stream after the VLM's last selected layer, which
is all that it gets to see of the VLM.
"""

from __future__ import annotations

import torch
from torch import nn

from apt.model.experts.apt import ActionExpert
from apt.model.experts.base import VLMFeatures, VLMReads


class TokenInsertionExpert(ActionExpert):
    """APT's blocks, stages and expansion without its gates."""

    def _build_fusion(self) -> None:
        pass  # there is none

    @property
    def reads(self) -> VLMReads:
        return VLMReads(hidden_states=(self.config.num_layers - 1,))

    def _enter(self, features: VLMFeatures) -> torch.Tensor:
        return features.hidden_states[self.config.num_layers - 1]

    def _fuse(self, x: torch.Tensor, block: int, features: VLMFeatures) -> torch.Tensor:
        return x

    def fusion_gates(self) -> list[tuple[int, str, nn.Parameter]]:
        return []

    def bare_parameters(self) -> list[nn.Parameter]:
        return [self.arm_embedding, *self.blocks[-1].attn.to_qkv.parameters()]
