"""What an ablation's cell is worth in the world of blocks, and what its layers know.

See ``examples/pickplace/ablation.py``.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from apt.ablation.evaluation import EvaluationRequest
from apt.ablation.results import Value
from apt.grounding.probe import Probe
from apt.model.config import feature_layers
from apt.model.encoders.hub import load_tokenizer
from examples.blocks.evaluate import BlocksEvaluateConfig
from examples.blocks.scenes import ScenesConfig, render
from examples.blocks.world import load_world
from examples.pickplace.ablation import Judge
from examples.pickplace.evaluate import ClosedLoopConfig
from examples.pickplace.record import RecordedEpisode
from examples.scene_parts import PER_PART

SPLITS = ("SO", "UO")
PROBED = 8 * PER_PART  # scenes, an eighth of them to judge by; some 600 names in each camera's
FIXED_CAMERA = "e2h_cam"
PROBED_SEED = 7000  # scenes that no VLM has learned from


def evaluate_policy(request: EvaluationRequest) -> dict[str, Value]:
    """:meth:`Judge.in_closed_loop`, of blocks that demonstrations moved and of pairs that no demonstration shows, and
    :meth:`BlocksJudge.by_layer`."""
    judge = BlocksJudge(request)
    return judge.in_closed_loop() | judge.by_layer()


def evaluate_open_loop(request: EvaluationRequest) -> dict[str, Value]:
    """:meth:`Judge.against_recordings`; needs no simulator."""
    return BlocksJudge(request).against_recordings()


class BlocksJudge(Judge):
    """Of policies that were trained on a world of ``examples/blocks``."""

    def __init__(self, request: EvaluationRequest) -> None:
        super().__init__(request)
        self._world_file = Path(self.recording["scene"])
        self._world = load_world(self._world_file).with_confusable(self.recording.get("confusable"))

    def settings(self) -> Sequence[str]:
        return SPLITS

    def closed_loop(self, setting: str, common: dict) -> ClosedLoopConfig:
        return BlocksEvaluateConfig(split=setting, world=self._world_file, **common)

    def instructions(self, episode: RecordedEpisode) -> tuple[str, list[str]]:
        split = self._world.split(self.recording["split"])
        layout = self._world.draw(np.random.default_rng(episode.seed), split)  # as the episode drew it
        own = layout.instructions[0]
        return own, [own.replace(str(layout.blocks[0]), str(other)) for other in layout.blocks[1:]]

    def by_layer(self) -> dict[str, Value]:
        """What the VLM's decoder layers know, and what of it comes in; needs the simulator.

        ``layer N/place_known``: share of names whose place in the fixed camera's picture a linear probe tells from
        the layer (``apt.grounding.probe``), ``layer N/told_apart``: of those nearer to it than to any other block's or
        tray's; ``layer N/let_through``: how much of the layer's features the expert's
        gate lets into its own stream, the mean over channels of ``1 - sigmoid(g)``.
        """
        return self._kept("layers.json", self._by_layer)

    def _by_layer(self) -> dict[str, Value]:
        policy = self._policy()
        vlm, stride = policy.model.vlm, policy.train_config.vlm_layer_stride
        with tempfile.TemporaryDirectory() as folder:
            render(ScenesConfig(Path(folder), PROBED, PROBED_SEED, image_size=self.recording["image_size"]))
            probe = Probe(Path(folder))
            known = probe.places_known(vlm.encoder, load_tokenizer(policy.train_config.vlm), range(vlm.num_layers))
        fixed = probe.cameras.index(FIXED_CAMERA)
        found = {f"layer {layer}/place_known": shares[fixed].within for layer, shares in known.items()}
        found |= {f"layer {layer}/told_apart": shares[fixed].apart for layer, shares in known.items()}
        layers = feature_layers(vlm.qwen.config.text_config.num_hidden_layers, stride)
        for feature, _, gate in policy.model.expert.fusion_gates():
            found[f"layer {layers[feature]}/let_through"] = float(1 - torch.sigmoid(gate).mean())
        return found
