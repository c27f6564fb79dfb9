"""What keeps a training step fast: no waiting for the device, no compiling anew."""

from __future__ import annotations

import contextlib
import sys
import threading
import traceback

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from apt.cli import parse_train_config
from apt.train import Trainer, select_backend
from tests.training.helpers import flags

aten = torch.ops.aten
# Operations whose result, or its size, the host must know: on a GPU each waits for all work before it.
WAITING = {
    aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal, aten.is_nonzero, aten._unique2,
    aten.unique_dim, aten.unique_consecutive, aten.bincount, aten.allclose,
}  # fmt: skip
INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}
READING = ("tolist", "cpu", "numpy", "item")


def where() -> str:
    """The lines of this project that lead here."""
    frames = [f for f in traceback.extract_stack() if "tests" not in f.filename and "site-packages" not in f.filename]
    return " < ".join(f"{f.filename.rsplit('/', 1)[-1]}:{f.lineno}" for f in reversed(frames) if "/apt/" in f.filename)


class NoWaiting(TorchDispatchMode):
    """Collects operations that would wait for a GPU, in this thread, while it is entered."""

    def __init__(self, monkeypatch) -> None:
        super().__init__()
        self.found: list[str] = []
        self.operations = 0
        self._thread: threading.Thread | None = None
        for name in READING:
            monkeypatch.setattr(torch.Tensor, name, self._watched(name, getattr(torch.Tensor, name)))

    def __enter__(self):
        self._thread = threading.current_thread()
        return super().__enter__()

    def __exit__(self, *exception):
        self._thread = None
        return super().__exit__(*exception)

    def _watched(self, name: str, method):
        def watched(tensor: torch.Tensor, *args, **kwargs):
            # The chunks of a vision tower's batch are counted on the host in the first place.
            if threading.current_thread() is self._thread and not self._is_on_host_anyway(tensor):
                self.found.append(f"{name} of {tuple(tensor.shape)} {tensor.dtype} at {where()}")
            return method(tensor, *args, **kwargs)

        return watched

    @staticmethod
    def _is_on_host_anyway(tensor: torch.Tensor) -> bool:
        caller = sys._getframe(2).f_code.co_filename
        return "modeling_qwen3_vl" in caller and tensor.dtype == torch.int32 and tensor.numel() == 1

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.operations += 1
        operation = func.overloadpacket
        by_mask = operation in INDEXING and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        by_counts = func is aten.repeat_interleave.Tensor and not (kwargs or {}).get("output_size")
        if operation in WAITING or by_mask or by_counts:
            self.found.append(f"{func} at {where()}")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: float(x[0]),
        lambda x: bool(x.any()),
        lambda x: x[x > 0],
        lambda x: x.tolist(),
        lambda x: x.repeat_interleave(torch.tensor([1, 2])),
        lambda x: (x > 0).nonzero(),
    ],
)
def test_the_watch_sees_what_would_wait(monkeypatch, wait):
    with NoWaiting(monkeypatch) as watch:
        wait(torch.ones(2))
    assert watch.found


@pytest.mark.parametrize(
    "fields",
    [
        {"train_stage": 0, "augment": False, "cache_vlm_features": "cache", "ema_enabled": True, "ema_start": 0},
        {"train_stage": 1, "vlm_finetune_mode": "full", "camera_view_dropout": 0.5, "robot_pose_aug": True},
    ],
    ids=["stage1-cached", "stage2-full"],
)
def test_no_step_between_two_log_lines_waits_for_the_device(tmp_path, located, monkeypatch, fields):
    if "cache_vlm_features" in fields:
        fields = {**fields, "cache_vlm_features": tmp_path / "cache"}
    common = {"max_iterations": 5, "log_interval": 100, "workers": 1, "gradient_accumulation_steps": 2}
    config = parse_train_config(flags(tmp_path, "run", noise_samples_per_obs=2, **common, **fields))
    trainer = Trainer(config, select_backend(config))
    mode, entered = NoWaiting(monkeypatch), contextlib.ExitStack()

    def at_the_end_of_a_step() -> bool:
        if trainer.iteration == 1:
            entered.enter_context(mode)
        elif trainer.iteration == 4:
            entered.close()
        return False

    monkeypatch.setattr(trainer, "_should_stop", at_the_end_of_a_step)
    trainer.run()
    assert mode.operations > 1000
    assert not mode.found, "\n".join(dict.fromkeys(mode.found))
