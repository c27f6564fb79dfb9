"""What a person would rather look at than read: trajectories on images, gates as a heat map. Each explains itself."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from apt.model.experts.expert import Expert
from data_utils.drawing.captions import TEXT, text_band
from data_utils.drawing.paths import PREDICTED, RECORDED
from data_utils.types import Batch
from infer_utils.draw_traj import COMPARISON_LEGEND, draw_on_cameras


def trajectory_picture(batch: Batch, predicted: torch.Tensor, samples: int = 4) -> np.ndarray:
    """Predicted (red) and recorded (green) futures of the first samples on every camera, (H, W, 3) uint8.

    Args:
        batch: on any device.
        predicted: (B, Ta, Nee, 17).
    """
    observation = batch.observation
    rows = []
    for index in range(min(samples, observation.batch_size)):
        arms, shown = observation.valid_ee[index], observation.camera_mask[index].cpu().numpy()
        futures = [(batch.future[index][:, arms], RECORDED), (predicted[index][:, arms], PREDICTED)]
        image = draw_on_cameras(
            observation.rgb[index, -1].cpu().numpy(),
            observation.K[index].cpu().numpy(),
            observation.world_from_cam[index, -1].cpu().numpy(),
            [(states.float().cpu().numpy(), color) for states, color in futures],
            shown=shown,
        )
        caption = f"“{observation.prompt[index]}” · {Path(batch.source[index]).name}"
        rows += [text_band(image.shape[1], [(caption, 13, TEXT)]), image]
    title = f"The next {predicted.shape[1]} steps of training samples, a row each, on all cameras"
    legend = [
        (title, 14, TEXT),
        *COMPARISON_LEGEND,
    ]
    return np.concatenate([text_band(rows[0].shape[1], legend), *rows], axis=0)


def gate_table(expert: Expert, vlm_layer_stride: int) -> list[tuple[str, np.ndarray]]:
    """What each layer's gates say, in the order of the layers: a label and ``sigmoid(gate)`` (h,), sorted. Empty for an
    architecture without gates."""
    return [
        (f"{row + 1}  {kind}, VLM layer {feature * vlm_layer_stride}", _kept(gate))
        for row, (feature, kind, gate) in enumerate(expert.fusion_gates())
    ]


def _kept(gate: torch.Tensor) -> np.ndarray:
    return torch.sigmoid(gate.detach().float()).sort().values.cpu().numpy()


def gate_picture(table: Sequence[tuple[str, np.ndarray]]) -> np.ndarray:
    """How much of its own stream each layer passes on as a heat map, of :func:`gate_table`; (H, W, 3) uint8.

    Layers down, channels across, sorted by value. Blue passes on 0 (all VLM), white 0.5 (as initialised), red 1.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    keep = np.stack([values for _, values in table])  # (layers, h)
    figure = Figure(figsize=(11, 2.3 + 0.3 * len(table)), dpi=90, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    heat = axes.imshow(keep, cmap="RdBu_r", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    axes.set_title("Gates: what each layer passes on to the next, its own stream or the VLM's features", loc="left")
    axes.set_yticks(range(len(table)), [label for label, _ in table])
    axes.set_ylabel("layer of the expert")
    axes.set_xlabel(f"the layer's {keep.shape[1]} channels, sorted by value")
    numbers = axes.secondary_yaxis("right")
    numbers.set_yticks(range(len(table)), [f"{k.mean():.3f}  ({k.min():.2f} to {k.max():.2f})" for k in keep])
    numbers.set_ylabel("mean (least to greatest)")
    bar = figure.colorbar(heat, ax=axes, orientation="horizontal", aspect=60, shrink=0.8)
    bar.set_ticks([0, 0.25, 0.5, 0.75, 1], labels=["0\nthe VLM's alone", "0.25", "0.5\nas initialised", "0.75",
                                                   "1\nits own alone"])  # fmt: skip
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
