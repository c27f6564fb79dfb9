"""What a run shows in TensorBoard: every number with a value it can have, and pictures that explain themselves."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from apt.model.experts.apt import ActionExpert
from apt.model.experts.config import ExpertConfig
from apt.training.pictures import gate_picture, gate_table
from tests.training.helpers import train

SCALARS = {
    "loss/total": (0, 1000),
    "loss/translation": (0, 100),
    "loss/rotation": (0, 100),
    "loss/gripper": (0, 100),
    "train/grad_norm": (1e-3, 1e4),
    "train/samples_per_s": (0.1, 1e4),
    "train/data_wait": (0, 1),
    "train/memory_gib": (0.1, 64),
    "train/skipped_steps": (0, 0),
    "data/bad_episodes": (0, 0),
    "data/loader_restarts": (0, 0),
    "lr/expert_decay": (1e-7, 1e-4),
    "lr/expert_no_decay": (1e-7, 1e-4),
    "lr/vlm_decay": (1e-8, 1e-5),
    "lr/vlm_no_decay": (1e-8, 1e-5),
}


@pytest.fixture(scope="module")
def events(tmp_path_factory, data_loc):
    """Of a run of three steps with a tuned VLM and pictures after the second; its folder and what it wrote."""
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("APT_DATA_LOC", str(data_loc))
        fields = {"vlm_finetune_mode": "full", "vlm_lr": 1e-5, "vis_interval": 2, "max_iterations": 3}
        assert train(folder, "run", **fields) == 0
    return folder, EventAccumulator(str(folder / "log" / "run"), size_guidance={"images": 0}).Reload()


def picture(events: EventAccumulator, tag: str) -> np.ndarray:
    (image,) = events.Images(tag)
    assert image.step == 2
    return np.asarray(Image.open(io.BytesIO(image.encoded_image_string)))


def test_every_number_of_a_run_is_in_tensorboard_and_in_the_table_with_a_sane_value(events):
    folder, board = events
    assert set(board.Tags()["scalars"]) == set(SCALARS) and set(board.Tags()["images"]) == {"trajectories", "gates"}
    rows = [json.loads(line) for line in (folder / "log/run/metrics.jsonl").read_text().splitlines()]
    for tag, (low, high) in SCALARS.items():
        shown = board.Scalars(tag)
        assert [event.step for event in shown] == [1, 2, 3] == [row["step"] for row in rows]
        for event, row in zip(shown, rows, strict=True):
            assert low <= event.value <= high, (tag, event.value)
            assert event.value == pytest.approx(row[tag], rel=1e-5)
    rates = [event.value for event in board.Scalars("lr/expert_decay")]
    assert rates == pytest.approx([1e-5, 2e-5, 3e-5]), "a tenth more of max_lr with each step of the warm-up"


def test_trajectories_are_drawn_on_every_camera_under_their_instruction(events):
    shown = picture(events[1], "trajectories")
    assert shown.shape[1] == 2 * 256, "two cameras across, enlarged from 64 pixels"
    assert 2 * 256 < shown.shape[0] < 3 * 256, "two samples down, captions above"
    red, green, blue = shown.astype(int).transpose(2, 0, 1)
    assert ((green > red + 40) & (green > blue + 40)).any(), "the recorded path is green"
    assert ((red > green + 60) & (red > blue + 60)).any(), "the predicted path is red"


@pytest.mark.parametrize("stage, wanted", [
    (0, ["1  vision-action, VLM layer 3", "2  vision-action, VLM layer 9"]),
    (1, ["1  language, VLM layer 0", "2  vision-action, VLM layer 3", "3  language, VLM layer 6",
         "4  vision-action, VLM layer 9", "5  language, VLM layer 12"]),
])  # fmt: skip
def test_rows_of_the_heat_map_say_which_layer_they_are_and_leave_out_gates_that_do_not_train(stage, wanted):
    expert = ActionExpert(ExpertConfig(width=48, heads=2, num_layers=6, input_dim=8, train_stage=stage))
    trained = [gate for gate in expert.gates if gate.requires_grad]
    with torch.no_grad():
        for index, gate in enumerate(trained):
            gate.copy_(torch.randn(48) + index)
    table = gate_table(expert, vlm_layer_stride=3)
    assert [label for label, _ in table] == wanted
    for (_, kept), gate in zip(table, trained, strict=True):
        np.testing.assert_allclose(kept, np.sort(1 / (1 + np.exp(-gate.detach().numpy()))), rtol=1e-5)


def test_a_gate_that_keeps_all_is_red_and_one_that_keeps_nothing_blue(events):
    image = gate_picture(
        [(name, np.full(192, kept)) for name, kept in (("first", 0.0), ("second", 0.5), ("third", 1.0))]
    )
    assert picture(events[1], "gates").shape[1:] == image.shape[1:]
    middle = image[:, image.shape[1] // 2].astype(int)  # a column through all rows
    left = image[:, image.shape[1] // 3].astype(int)
    strong = [tuple(int(v) for v in pixel) for pixel in left if pixel.max() - pixel.min() > 80]
    assert strong[0][2] > strong[0][0] and any(red > blue + 60 for red, _, blue in strong), "blue above, red below"
    assert (np.abs(middle - 247).max(axis=1) < 4).any(), "a gate as initialised is white"
