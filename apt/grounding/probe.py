"""Which layers of a vision-language model know where the named thing is? A linear probe on each says.

    python -m apt.grounding.probe --vlm blocks --scenes data/blocks_scenes

At the last token of a name, in instructions as a policy gives them, the residual stream after each decoder layer is
read linearly: which of 48 places, along width and height, does it say that the named thing has in a camera's picture?
An action expert can take from a layer what a linear map of it tells. In brackets: how often that is nearer to the named
thing than to any other of its kind, which is what taking the right one asks for; on scenes of things that are alike
(``--confusable 1`` of blocks' scenes) it says how well they are told apart.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from apt.grounding.batches import BatchMaker
from apt.grounding.dialogues import DialogueSampler
from apt.grounding.scenes import SceneSet, Thing, parts_of
from apt.model.config import feature_layers
from apt.model.encoders import hub
from apt.model.encoders.qwen3vl import Qwen3VLEncoder
from data_utils.cli import CommandLineError, Parser
from train_utils.errors import ConfigError

BINS = 48
RIDGE = 1e-3  # of the mean variance of a feature
BATCH = 32


class Probe:
    """Probes for one set of scenes: its first part judges what was fitted to the others.

    Raises:
        ConfigError: fewer than two parts.
        DataError: see :class:`apt.grounding.scenes.SceneSet`.
    """

    def __init__(self, scenes: Path, seed: int = 0) -> None:
        parts = parts_of(scenes)
        if len(parts) < 2:
            raise ConfigError(f"{scenes} has {len(parts)} parts; wanted two at least, the first for judging")
        self._fitting, self._judging = SceneSet(parts[1:]), SceneSet(parts[:1])
        self._seed = seed

    @property
    def cameras(self) -> tuple[str, ...]:
        return self._fitting.description.cameras

    @torch.inference_mode()
    def places_known(self, encoder: Qwen3VLEncoder, tokenizer, layers: Sequence[int]) -> dict[int, list[Known]]:
        """Per decoder layer, and camera in the order of :attr:`cameras`."""
        fitting = self._read(encoder, tokenizer, self._fitting, layers)
        judging = self._read(encoder, tokenizer, self._judging, layers)
        found = {}
        for layer in layers:
            found[layer] = []
            for camera in range(len(self.cameras)):
                known, asked = fitting.camera == camera, judging.camera == camera
                told = linear_probe(
                    fitting.streams[layer][known], fitting.place[known], judging.streams[layer][asked], BINS
                )
                others = [judging.rivals[index] for index in asked.nonzero().flatten()]
                within = share_within(told, judging.place[asked], BINS)
                found[layer].append(Known(within, share_apart(told, judging.place[asked], others, BINS)))
        return found

    def _read(self, encoder: Qwen3VLEncoder, tokenizer, scenes: SceneSet, layers: Sequence[int]) -> Mentions:
        grid = scenes.description.image_size // encoder.pixels_per_token
        sampler = DialogueSampler(scenes, tokenizer, grid**2, BINS)
        maker = BatchMaker(scenes, sampler, scenes.names(), grid, tokenizer.pad_token_id, encoder.image_token_id)
        rng, read = np.random.default_rng(self._seed), []
        device = next(encoder.parameters()).device
        for some in np.array_split(np.arange(len(scenes)), max(1, len(scenes) // BATCH)):
            batch = maker.instructions(rng, some)
            inputs = (batch.images, batch.input_ids, batch.position_ids, batch.attention_mask)
            _, streams, _ = encoder(*(part.to(device) for part in inputs), tuple(layers))
            sequence, token, camera = batch.mention.unbind(1)
            read.append(
                Mentions(
                    {layer: streams[layer].float().cpu()[sequence, token] for layer in layers},
                    camera,
                    batch.mention_place,
                    [
                        rivals(scenes.things[scene], thing, int(shown_by))
                        for (scene, thing), shown_by in zip(batch.mentioned, camera, strict=True)
                    ],
                )
            )
        return Mentions.joined(read)


@dataclass(frozen=True)
class Known:
    """What a probe tells of names in one camera's picture, as shares of them; 0 where there are none."""

    within: float
    """Places within one of ``BINS``, along both axes."""
    apart: float
    """Places nearer to what is named than to anything else of its kind."""


@dataclass
class Mentions:
    """M names in instructions.

    Args:
        streams: by decoder layer, (M, C) at their last tokens.
        camera: (M,) in whose picture; place: (M, 2) u and v there.
        rivals: M of (R, 2), places of other things of the same kind there.
    """

    streams: dict[int, torch.Tensor]
    camera: torch.Tensor
    place: torch.Tensor
    rivals: list[torch.Tensor]

    @classmethod
    def joined(cls, some: Iterable[Mentions]) -> Mentions:
        some = list(some)
        streams = {layer: torch.cat([one.streams[layer] for one in some]) for layer in some[0].streams}
        camera, place = torch.cat([one.camera for one in some]), torch.cat([one.place for one in some])
        return cls(streams, camera, place, [others for one in some for others in one.rivals])


def linear_probe(features: torch.Tensor, places: torch.Tensor, asked: torch.Tensor, bins: int) -> torch.Tensor:
    """Ridge regression onto a bump over the bins of each axis, whose peak is the answer.

    Args:
        features: (M, C) to fit to ``places`` (M, 2), shares of the picture; asked: (Q, C).
    Returns:
        (Q, 2) bins, of u and v.
    """
    mean, scale = features.double().mean(0), features.double().std(0).clamp(min=1e-6)

    def inputs(given: torch.Tensor) -> torch.Tensor:
        return nn.functional.pad((given.double() - mean) / scale, (0, 1), value=1.0)

    x, middles = inputs(features), (torch.arange(bins, dtype=torch.float64) + 0.5) / bins
    bumps = torch.exp(-0.5 * ((places.double().unsqueeze(-1) - middles) * bins) ** 2)  # (M, 2, bins)
    gram = x.T @ x + RIDGE * len(x) * torch.eye(x.shape[1], dtype=torch.float64)
    weights = torch.linalg.solve(gram, x.T @ bumps.flatten(1))
    return (inputs(asked) @ weights).unflatten(1, (2, bins)).argmax(-1)


def share_within(told: torch.Tensor, places: torch.Tensor, bins: int) -> float:
    """Of bins (Q, 2), those at most one beside the places' own, along both axes; 0 where there are none."""
    right = (told - (places * bins).long().clamp(max=bins - 1)).abs() <= 1
    return float(right.all(1).float().mean()) if len(right) else 0.0


def rivals(things: Iterable[Thing], named: Thing, camera: int) -> torch.Tensor:
    """(R, 2) places of what else of its kind a camera's picture shows."""
    others = (thing for thing in things if thing.kind == named.kind and thing.name != named.name)
    shown = [other.places[camera] for other in others if other.places[camera] is not None]
    return torch.tensor(shown, dtype=torch.float32).view(-1, 2)


def share_apart(told: torch.Tensor, places: torch.Tensor, rivals: Sequence[torch.Tensor], bins: int) -> float:
    """Of bins (Q, 2), those whose middle is nearer to their own of ``places`` (Q, 2) than to any of ``rivals``, Q of
    (R, 2); 0 where there are none."""
    right = 0
    for bin_, place, others in zip(told, places, rivals, strict=True):
        middle = (bin_ + 0.5) / bins
        right += bool((torch.dist(middle, place) < (others - middle).norm(dim=1)).all())
    return right / len(told) if len(told) else 0.0


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(
        prog="python -m apt.grounding.probe",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--vlm", default="blocks", help="small Qwen3-VL of apt.grounding (default: %(default)s)")
    parser.add_argument("--scenes", type=Path, required=True, help="folder of rendered parts")
    try:
        args = parser.parse_args(argv)
        probe = Probe(args.scenes)
        model = hub.load_model(args.vlm, torch.float32).eval()
        encoder = Qwen3VLEncoder(model, *hub.load_image_statistics(args.vlm))
        layers = feature_layers(model.config.text_config.num_hidden_layers, 1)
        found = probe.places_known(encoder, hub.load_tokenizer(args.vlm), layers)
    except (CommandLineError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("layer  " + "  ".join(f"{name:>11}" for name in probe.cameras))
    for layer, known in found.items():
        told = (f"{f'{one.within:.0%} ({one.apart:.0%})':>11}" for one in known)
        print(f"{layer:>5}  " + "  ".join(told))
    return 0


if __name__ == "__main__":
    sys.exit(main())
