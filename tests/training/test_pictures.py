"""Pictures of a run, in TensorBoard's files and on their own."""

from __future__ import annotations

import io

import numpy as np
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.training.helpers import train
from train_utils.pictures import gate_picture


def test_a_run_shows_losses_trajectories_and_gates_in_tensorboard(tmp_path, located):
    assert train(tmp_path, "run", max_iterations=2, vis_interval=2) == 0
    events = EventAccumulator(str(tmp_path / "log" / "run"), size_guidance={"images": 0}).Reload()
    assert {"trajectories", "gates"} <= set(events.Tags()["images"])
    assert {"loss/total", "loss/translation", "train/data_wait", "lr/expert_decay"} <= set(events.Tags()["scalars"])
    shown = np.asarray(Image.open(io.BytesIO(events.Images("trajectories")[0].encoded_image_string)))
    assert shown.shape == (2 * 256, 2 * 256, 3), "two samples down, two cameras across, enlarged from 64 pixels"
    red, green, blue = shown.astype(int).transpose(2, 0, 1)
    assert ((green > red + 40) & (green > blue + 40)).any(), "the recorded path is green"


def test_a_gate_that_keeps_all_is_red_and_one_that_keeps_nothing_blue():
    picture = gate_picture(torch.tensor([[-20.0] * 192, [0.0] * 192, [20.0] * 192]))
    below, middle, above = picture[8, 100], picture[24, 100], picture[40, 100]
    assert below[2] > below[0] and above[0] > above[2] and middle[1] > max(middle[0], middle[2])
