"""What keeps a training step fast: no waiting for the device, no compiling anew."""

from __future__ import annotations

import contextlib
import sys
import threading
import traceback

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode

from apt.model.config import VLAConfig
from apt.model.vla import VLA
from apt.train import select_backend
from apt.training.cli import parse_train_config
from apt.training.trainer import Trainer
from benchmarks.flops import count_flops
from tests.model.helpers import make_batch
from tests.training.helpers import flags
from train_utils.backend import Backend

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


WAYS = {
    "stage1-cached": {"train_stage": 0, "augment": False, "ema_enabled": True, "ema_start": 0},
    "stage2-full": {
        "train_stage": 1, "vlm_finetune_mode": "full", "camera_view_dropout": 0.5, "robot_pose_aug": True,
    },
}  # fmt: skip


@contextlib.contextmanager
def gpu_that_refuses_to_be_waited_for():
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_no_step_between_two_log_lines_waits_for_the_device(tmp_path, located, monkeypatch, way, device):
    common = {"max_iterations": 3, "log_interval": 100, "workers": 1, "gradient_accumulation_steps": 2}
    cache = {"cache_vlm_features": tmp_path / "cache"} if way == "stage1-cached" else {}
    options = {"noise_samples_per_obs": 2, "device": device, **common, **cache, **WAYS[way]}
    config = parse_train_config(flags(tmp_path, "run", **options))
    trainer = Trainer(config, select_backend(config))
    watch = NoWaiting(monkeypatch) if device == "cpu" else gpu_that_refuses_to_be_waited_for()
    entered = contextlib.ExitStack()

    def at_the_end_of_a_step(_backend: Backend) -> bool:
        if trainer.iteration == 1:
            entered.enter_context(watch)
        elif trainer.iteration == 2:
            entered.close()
        return False

    monkeypatch.setattr(trainer._stop, "agreed", at_the_end_of_a_step)
    with entered:
        trainer.run()
    if device == "cpu":
        assert watch.operations > 1000
        assert not watch.found, "\n".join(dict.fromkeys(watch.found))


# -- compiling ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("draws", [1, 3])
def test_prompts_of_any_length_compile_the_expert_twice_at_most_and_whole(draws):
    """Once for the first length, once for lengths that vary; a graph that breaks is an error here."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = VLA(VLAConfig(model="tiny", vlm="tiny", vlm_layer_stride=2, num_future=8)).train()
    compiled = CompileCounter()  # counts graphs and runs them as they are
    words = "pick up the milk then the can and put them into the large wooden box".split()
    batches = [make_batch(model.vlm, [" ".join(words[:count])] * 2) for count in (2, 5, 9, 14, 3)]
    assert len({batch.observation.input_ids.shape for batch in batches}) == len(batches)

    def losses() -> list[float]:
        seeds = [torch.Generator().manual_seed(0) for _ in batches]
        return [
            model(batch, seed, noise_samples=draws).total.item() for batch, seed in zip(batches, seeds, strict=True)
        ]

    plain = losses()
    model.expert.compile(backend=compiled, fullgraph=True)
    assert losses() == pytest.approx(plain, rel=1e-5)
    assert 1 <= compiled.frame_count <= 2
    torch._dynamo.reset()


# -- what the benchmark counts -----------------------------------------------------------------------------------------


def test_counted_operations_are_those_of_the_formulas():
    model = VLA(VLAConfig(model="tiny", vlm="tiny", vlm_layer_stride=1, num_future=8, train_stage=0)).train()
    batch, samples, cameras = make_batch(model.vlm, ["go"] * 3), 3, 2
    text, vision = model.vlm.qwen.config.text_config, model.vlm.qwen.config.vision_config

    tokens = batch.observation.input_ids.shape[1]
    heads, groups = text.num_attention_heads * text.head_dim, text.num_key_value_heads * text.head_dim
    width = text.hidden_size
    layer = tokens * (width * (2 * heads + 2 * groups) + 3 * width * text.intermediate_size) + 2 * tokens**2 * heads
    language = 2 * samples * (max(model.vlm.layers) + 1) * layer
    patches, d = (64 // vision.patch_size) ** 2, vision.hidden_size
    block = patches * (4 * d * d + 2 * d * vision.intermediate_size) + 2 * patches**2 * d
    merged = vision.spatial_merge_size**2 * d
    mergers = 1 + len(vision.deepstack_visual_indexes)
    merger = patches // vision.spatial_merge_size**2 * (merged * merged + merged * vision.out_hidden_size)
    embedding = patches * 3 * vision.patch_size**2 * d
    images = 2 * samples * cameras * (vision.depth * block + mergers * merger + embedding)
    assert count_flops(lambda: model.vlm(batch.observation)) == pytest.approx(language + images, rel=1e-3)

    features = model.vlm(batch.observation)
    h, blocks, seen = model.expert.config.width, len(model.expert.blocks), features.camera.shape[1]
    steps = model.expert.config.num_history + model.expert.config.num_future
    per_token = 4 * h * h + 6 * h * h  # attention's projections, gated MLP
    pairs = 2 * h * (seen * seen + steps * (seen + steps))
    whole = blocks * (seen + steps) * per_token + blocks * pairs + blocks * seen * width * h
    # The last block computes of the VL tokens their keys and values alone.
    whole -= seen * (per_token - 2 * h * h) + 2 * h * seen * seen
    forward = count_flops(lambda: model(batch, features=features))
    assert forward == pytest.approx(2 * samples * whole, rel=0.1), "the rest is states, time and head"
    both = count_flops(lambda: model(batch, features=features).total.backward())
    assert both == pytest.approx(3 * forward, rel=0.12), "two products backward for one forward, less the inputs'"
