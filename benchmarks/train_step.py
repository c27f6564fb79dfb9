"""Where a training step's time goes, and what the model's two shortcuts save.

Prints, per stage, medians over the steps: milliseconds of VLM, expert, backward pass, optimiser and waiting for data,
samples per second and GPU memory. The baseline of the ratio, named "plain", is the same step without two shortcuts:
images go through the vision tower one at a time, as in Hugging Face's forward pass, and Stage 1 shows the prompt to the
VLM and carries language along, masked.

    python benchmarks/train_step.py                                     # tiny, any CPU
    python benchmarks/train_step.py --model base --vlm Qwen/Qwen3-VL-2B-Instruct --random-vlm --bs 32 --bf16
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from contextlib import contextmanager
from pathlib import Path

import torch
from loader import make_episodes

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from a clone, without an installation

from apt.policy_config import VLAConfig
from apt.vla import VLA
from data_utils.datasets import PickPlaceCan
from data_utils.loader import build_loader
from train_utils.backend import DDPBackend
from train_utils.optim import build_optimizer

PARTS = ("data wait", "VLM", "expert", "backward", "optimiser")


class Timer:
    """Wall time per part; waits for the device, so that a part's kernels count where they were asked for."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.seconds: dict[str, list[float]] = defaultdict(list)

    @contextmanager
    def part(self, name: str):
        self._wait()
        began = time.perf_counter()
        yield
        self._wait()
        self.seconds[name].append(time.perf_counter() - began)

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def measure(args: argparse.Namespace, stage: int, mode: str, device: torch.device, shortcuts: bool, data: Path) -> dict:
    """Mean seconds per part over the timed steps, and the peak memory in GiB."""
    torch.manual_seed(0)
    config = VLAConfig(
        model=args.model, vlm=args.vlm, vlm_layer_stride=args.stride, vlm_mode=mode, train_stage=stage,
        attention_backend=args.attention, gradient_checkpointing=args.gc,
    )  # fmt: skip
    frozen = torch.bfloat16 if args.bf16 and device.type == "cuda" else torch.float32
    model = VLA(config, frozen_dtype=frozen, random_vlm=args.random_vlm)
    if not shortcuts:
        model.vlm.vision_only = False
        tower = model.vlm.encoder._vision

        def one_by_one(images: torch.Tensor):
            outputs = [tower(image[None]) for image in images]
            levels = [torch.cat(level) for level in zip(*(deep for _, deep in outputs), strict=True)]
            return torch.cat([embeds for embeds, _ in outputs]), levels

        model.vlm.encoder._vision = one_by_one
    model.to(device).train()
    backend = DDPBackend(device.type)
    backend.prepare(model, build_optimizer(model, 1e-4, 1e-2))
    config = dataclasses.replace(PickPlaceCan.config, image_hw=(args.image_size, args.image_size))
    dataset = PickPlaceCan(sorted(map(str, data.iterdir())), config=config)
    tokenize = model.vlm.prompt_tokenizer(dataset.config.image_hw)
    loader, _ = build_loader(
        [dataset], weights=None, multiplex=10000, batch_size=args.bs, workers=args.workers, rank=0, world_size=1,
        seed=0, tokenize=tokenize, pad_id=tokenize.pad_id, pin_memory=device.type == "cuda", persistent_workers=False,
        prefetch_factor=4, timeout=300,
    )  # fmt: skip
    batches = iter(loader)
    timer = Timer(device)

    handles = _time_vlm(model, lambda: timer)
    autocast = torch.autocast(device.type, dtype=torch.bfloat16, enabled=args.bf16)
    for step in range(args.warmup + args.steps):
        if step == args.warmup:
            timer = Timer(device)
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
        with timer.part("data wait"):
            batch = next(batches).to(device)
        with timer.part("VLM and expert"), autocast:
            loss = model(batch).total
        with timer.part("backward"):
            backend.backward(loss)
        with timer.part("optimiser"):
            backend.step(1.0)
    for handle in handles:
        handle.remove()
    # Medians: the machine may be shared, and one stall would make a row of its own.
    seconds = {name: statistics.median(values) for name, values in timer.seconds.items()}
    seconds["expert"] = seconds.pop("VLM and expert") - seconds["VLM"]
    memory = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else float("nan")
    return {"parts": seconds, "step": sum(seconds.values()), "memory": memory}


def _time_vlm(model: VLA, timer) -> list:
    """Hooks that book the VLM's forward pass on the current timer."""
    open_parts = []

    def enter(*_):
        open_parts.append(timer().part("VLM"))
        open_parts[-1].__enter__()

    def leave(*_):
        open_parts.pop().__exit__(None, None, None)

    return [model.vlm.register_forward_pre_hook(enter), model.vlm.register_forward_hook(leave)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", help="size of the expert (default: %(default)s)")
    parser.add_argument("--vlm", default="tiny", help="name or folder (default: %(default)s)")
    parser.add_argument("--random-vlm", action="store_true", help="random weights from the VLM's configuration alone")
    parser.add_argument("--stride", type=int, help="VLM layer stride (default: 1 for tiny, else 3)")
    parser.add_argument("--image-size", type=int, help="side of the images (default: 128 for tiny, else 256)")
    parser.add_argument("--bs", type=int, default=8)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--bf16", action="store_true", help="bfloat16 autocast")
    parser.add_argument("--gc", action="store_true", help="gradient checkpointing in the VLM")
    parser.add_argument("--attention", default="sdpa", choices=("sdpa", "xformers"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    args.stride = args.stride or (1 if args.vlm == "tiny" else 3)
    args.image_size = args.image_size or (128 if args.vlm == "tiny" else 256)  # 64 tokens per camera either way
    device = torch.device(args.device)
    print(f"{args.model} expert, VLM {args.vlm}, batch {args.bs}, two {args.image_size}-pixel cameras, {device}")
    columns = [f"{name:>11}" for name in (*PARTS, "step", "samples/s", "GiB", "ratio")]
    print(f"{'milliseconds':<42}{''.join(columns)}")
    with tempfile.TemporaryDirectory() as folder:
        make_episodes(Path(folder), episodes=8, frames=40)
        for stage, mode in ((0, "frozen"), (1, "frozen"), (1, "full")):
            title = f"{'Stage 1 (VA prior)' if stage == 0 else 'Stage 2 (VLA)'}, VLM {mode}"
            base = measure(args, stage, mode, device, shortcuts=False, data=Path(folder))
            ours = measure(args, stage, mode, device, shortcuts=True, data=Path(folder))
            for name, result in ((f"{title}, plain", base), (title, ours)):
                milliseconds = [1e3 * result["parts"][part] for part in PARTS] + [1e3 * result["step"]]
                ratios = (args.bs / result["step"], result["memory"], base["step"] / result["step"])
                print(
                    f"{name:<42}"
                    + "".join(f"{v:>11.1f}" for v in milliseconds)
                    + "".join(f"{v:>11.2f}" for v in ratios)
                )


if __name__ == "__main__":
    main()
