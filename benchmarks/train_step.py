"""Training steps as the trainer makes them: samples per second, where the time goes, and how well the machine is used.

    python benchmarks/train_step.py                                    # any CPU, some minutes
    python benchmarks/train_step.py --model base --vlm qwen3-vl-2b-sizes --bs 32 --bf16 --gc --compile --save   # a GPU

One row per way to train; the ratio is in noise draws per second, against the row that it names:

    plain      the baseline: images go through the vision tower one at a time, as in Hugging Face's forward pass, and
               Stage 1 shows the prompt to the VLM and carries language along, masked
    ours       neither of that
    K draws    several noise draws share one VLM pass and one pass of the VL stream (--noise_samples_per_obs)
    K apart    as K draws, but keys and values of VL tokens are repeated for each draw, and attention is PyTorch's own
               kernel also where a CPU computes gradients: before both were changed
    K, bf16    as K draws, under bfloat16 autocast; of a CPU that multiplies in it (--half)
    N steps    as the row before, with chunks of N steps instead of 32 (--future): where a policy plans anew after 8,
               steps far ahead cost and are not executed
    cache      features of a frozen VLM on disk (--cache_vlm_features); cold: all are computed and written, warm: all
               are read, from memory where the operating system still has them
    gc         gradient checkpointing in the VLM (--gc)
    compiled   torch.compile of the expert (--use_compile); the first steps, which compile, are left out

"FLOP/s" are those that the row needs, without what gradient checkpointing computes twice, and "MFU" is their share of
what the same machine does in square matrix products. The VLM has random weights; by default it is a quarter as wide as
Qwen3-VL-2B beside the expert "tiny", a quarter as wide as "base", so that both take the shares that they really take.

Let nothing else run on the machine meanwhile: with another process on its cores or its GPU the numbers mean nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from a clone, without an installation

from apt.model.compilation import pad_multiple
from apt.model.config import VLAConfig
from apt.model.experts.context import JointContext, VLContext
from apt.model.experts.loss import ExpertLoss
from apt.model.layers import attention
from apt.model.vla import VLA
from apt.training.feature_cache import FeatureCache
from benchmarks.episodes import make_episodes
from benchmarks.flops import count_flops, matmul_ceiling, seconds_of
from benchmarks.qwen_sizes import SIZES, qwen3_vl_2b_folder
from benchmarks.report import RESULTS, machine, save_table
from data_utils.batches.loader import build_loader
from data_utils.batches.options import LoaderOptions
from data_utils.datasets import PickPlaceCan
from data_utils.types import Batch
from train_utils.backend import DDPBackend
from train_utils.feature_store import FeatureStore
from train_utils.optim import build_optimizer

_FOR_DRAWS, _TRAINABLE_ON_CPU = JointContext.for_draws, attention.trainable_on_cpu
PARTS = ("data wait", "VLM", "expert", "backward", "optimiser")


@dataclass(frozen=True)
class Row:
    """One way to train."""

    name: str
    against: str | None = None  # the row whose speed is 1
    plain: bool = False
    draws: int = 1
    cache: str | None = None  # "cold" or "warm"
    gc: bool = False
    compiled: bool = False
    apart: bool = False
    half: bool = False
    future: int | None = None  # steps of a chunk, where they are not the data set's


@dataclass(frozen=True)
class Result:
    """Medians over the steps."""

    step: float  # seconds
    parts: dict[str, float]  # seconds, each with its own wait for the device
    gib: float | None  # peak of the device's memory
    flops: float  # of one step


def rows_of(stage: int, mode: str, args: argparse.Namespace) -> list[Row]:
    """The rows of one model. Checkpointing comes last: once on, it stays on."""
    rows = [Row("plain", plain=True), Row("ours", "plain")]
    if stage == 0 or mode == "frozen":
        many = f"ours, {args.draws} draws"
        rows += [Row(f"{args.draws} draws apart", "ours", draws=args.draws, apart=True)]
        rows += [Row(many, f"{args.draws} draws apart", draws=args.draws)]
        if args.half:
            rows += [Row(f"{many}, bf16", f"{args.draws} draws apart", draws=args.draws, half=True)]
        if args.future:
            name = f"{many}, bf16, {args.future} steps" if args.half else f"{many}, {args.future} steps"
            against = f"{args.draws} draws apart"
            rows += [Row(name, against, draws=args.draws, half=args.half, future=args.future)]
    if stage == 0:
        rows += [Row(f"cache {state}", "ours", cache=state) for state in ("cold", "warm")]
        rows.append(Row(f"cache warm, {args.draws} draws", "ours", cache="warm", draws=args.draws))
    if args.compile:
        rows.append(Row("ours, compiled", "ours", compiled=True))
        if stage == 0:
            rows.append(Row("cache warm, compiled", "cache warm", cache="warm", compiled=True))
    if args.gc and mode != "frozen":
        rows.append(Row("ours, gc", "ours", gc=True))
    return rows


class Timer:
    """Wall time per part; ``wait`` for the device, so that a part's kernels count where they were asked for."""

    def __init__(self, device: torch.device, wait: bool) -> None:
        self._device, self._wait = device, wait and device.type == "cuda"
        self.seconds: dict[str, list[float]] = defaultdict(list)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        self._synchronize()
        began = time.perf_counter()
        yield
        self._synchronize()
        self.seconds[name].append(time.perf_counter() - began)

    def _synchronize(self) -> None:
        if self._wait:
            torch.cuda.synchronize(self._device)


class Bench:
    """A model, and the steps that its rows take.

    Args:
        stage: 0 or 1, as on the command line; mode: of the VLM.
        episodes: files to train on.
        folder: for caches.
        future: steps of a chunk.
    """

    def __init__(
        self, stage: int, mode: str, args: argparse.Namespace, episodes: list[Path], folder: Path, future: int
    ) -> None:
        self.args, self.device, self.stage = args, torch.device(args.device), stage
        self._episodes, self._folder = episodes, folder
        torch.manual_seed(0)
        config = VLAConfig(
            model=args.model, vlm=args.vlm, vlm_layer_stride=args.stride, vlm_mode=mode, train_stage=stage,
            attention_backend=args.attention, num_future=future,
        )  # fmt: skip
        frozen = torch.bfloat16 if args.bf16 and self.device.type == "cuda" else torch.float32
        with self.device:  # random weights of full size are made there in a moment
            self.model = VLA(config, frozen_dtype=frozen, random_vlm=args.random_vlm).train()
        self.model.to(self.device)
        self._backend = DDPBackend(self.device.type)
        self._backend.prepare(self.model, build_optimizer(self.model, 1e-4, 1e-2))
        self._tower = self.model.vlm.encoder._vision
        self._counted: dict[tuple, float] = {}

    def measure(self, row: Row) -> Result:
        """Step times of a row, then, on a GPU in further steps, those of its parts."""
        self._set(row)
        cache, batches = self._data(row)
        try:
            batch = next(batches).to(self.device)
            if cache is not None:
                with self._autocast():
                    cache.features(batch)  # a cold row writes all that a warm one will read
            flops = self._flops(row, cache if row.cache == "warm" else None, batch)
            for _ in range(self.args.warmup):
                self._step(row, cache, batches, Timer(self.device, wait=False))
            if self.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(self.device)
            timer = Timer(self.device, wait=False)
            times = [
                seconds_of(self.device, lambda: self._step(row, cache, batches, timer)) for _ in range(self.args.steps)
            ]
            gib = torch.cuda.max_memory_allocated(self.device) / 2**30 if self.device.type == "cuda" else None
            if self.device.type == "cuda":
                timer = Timer(self.device, wait=True)
                for _ in range(3):
                    self._step(row, cache, batches, timer)
        finally:
            if cache is not None:
                cache.close()
        # Medians: the machine may be shared, and one stall would make a row of its own.
        parts = {name: statistics.median(values) for name, values in timer.seconds.items()}
        return Result(statistics.median(times), parts, gib, flops)

    def _set(self, row: Row) -> None:
        self._half = self.args.bf16 or row.half
        JointContext.for_draws = VLContext.for_draws if row.apart else _FOR_DRAWS
        attention.trainable_on_cpu = F.scaled_dot_product_attention if row.apart else _TRAINABLE_ON_CPU
        vlm = self.model.vlm
        vlm.vision_only = self.stage == 0 and not row.plain
        vlm.encoder._vision = self._one_by_one if row.plain else self._tower
        if row.gc:
            vlm.qwen.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.model.expert._compiled_call_impl = None  # as it was before compile()
        if row.compiled:
            self.model.expert.compile(dynamic=False)

    def _one_by_one(self, images: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        outputs = [self._tower(image[None]) for image in images]
        levels = [torch.cat(level) for level in zip(*(deep for _, deep in outputs), strict=True)]
        return torch.cat([embeds for embeds, _ in outputs]), levels

    def _data(self, row: Row) -> tuple[FeatureCache | None, Iterator[Batch]]:
        """Batches of the same samples for every row; a warm cache has been filled with them by the cold one."""
        args, cuda = self.args, self.device.type == "cuda"
        changes = {f"aug_{kind}": False for kind in ("crop", "color", "blur", "background")}
        size = (args.image_size, args.image_size)
        changes |= {"image_hw": size, "num_future": row.future or PickPlaceCan.config.num_future}
        dataset = PickPlaceCan(
            list(map(str, self._episodes)), config=dataclasses.replace(PickPlaceCan.config, **changes)
        )
        tokenize = self.model.vlm.prompt_tokenizer(size)
        options = LoaderOptions(
            batch_size=args.bs,
            workers=args.workers,
            multiplex=10000,
            pin_memory=cuda,
            prefetch_factor=4,
            timeout=300,
        )
        multiple = pad_multiple(row.compiled)
        loader, _ = build_loader([dataset], options, tokenize=tokenize, pad_id=tokenize.pad_id, pad_multiple=multiple)
        batches = iter(loader)
        if row.cache is None:
            return None, batches
        store = FeatureStore(self._folder / f"cache-{self.stage}", limit=1e12)
        cache = FeatureCache(self.model.vlm, store, args.bf16)
        return cache, cache.ahead(batches)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self._half)

    def _forward(self, row: Row, cache: FeatureCache | None, batch: Batch, timer: Timer) -> ExpertLoss:
        with self._autocast():
            with timer.part("VLM"):
                features = self.model.vlm(batch.observation) if cache is None else cache.features(batch)
            with timer.part("expert"):
                return self.model(batch, noise_samples=row.draws, features=features)

    def _step(self, row: Row, cache: FeatureCache | None, batches: Iterator[Batch], timer: Timer) -> None:
        with timer.part("data wait"):
            batch = next(batches).to(self.device)
        loss = self._forward(row, cache, batch, timer).total
        with timer.part("backward"):
            self._backend.backward(loss)
        with timer.part("optimiser"):
            self._backend.step(1.0)

    def _flops(self, row: Row, cache: FeatureCache | None, batch: Batch) -> float:
        """Of one step. Compiling and recomputing do not change what a row needs: its like is counted without them."""
        kind = (row.plain, row.draws, row.cache == "warm", row.apart, row.future)
        if kind not in self._counted:
            timer = Timer(self.device, wait=False)
            self._set_attention("sdpa")  # the counter knows no other
            self._counted[kind] = count_flops(lambda: self._forward(row, cache, batch, timer).total.backward())
            self._set_attention(self.args.attention)
            self.model.zero_grad(set_to_none=True)
        return self._counted[kind]

    def _set_attention(self, backend: str) -> None:
        for block in self.model.expert.blocks:
            block.attn.backend = backend


def describe(args: argparse.Namespace, ceiling: float) -> str:
    device = torch.device(args.device)
    return (
        f"{args.model} expert, VLM {args.vlm_name}, batch {args.bs}, two {args.image_size}-pixel cameras, "
        f"{'bf16' if args.bf16 else 'fp32'} on {machine(device)}, torch {torch.__version__}: matrix products reach "
        f"{ceiling / 1e12:.3g} TFLOP/s"
    )


def table(results: Iterator[tuple[tuple[str, Row], Result]], args: argparse.Namespace, ceiling: float) -> Iterator[str]:
    """Lines of a Markdown table, the latest rows as soon as they are known."""
    yield (
        "| | "
        + " | ".join((*(f"{part} ms" for part in PARTS), "step ms"))
        + (" | samples/s | draws/s | GiB | TFLOP | TFLOP/s | MFU | ratio |")
    )
    yield "|---" * (len(PARTS) + 9) + "|"
    speed: dict[tuple[str, str], float] = {}
    flops: dict[str, float] = {}
    share: float | None = None
    for (title, row), result in results:
        rate = args.bs / result.step
        flops[row.name] = result.flops
        if row.name == "cache warm":
            share = 1 - result.flops / flops["ours"]
        speed[title, row.name] = rate * row.draws
        ratio = f"{speed[title, row.name] / speed[title, row.against]:.2f}x {row.against}" if row.against else "1"
        milliseconds = [1e3 * result.parts[part] for part in PARTS] + [1e3 * result.step]
        used = result.flops / result.step
        cells = [
            f"{title}, {row.name}", *(f"{value:.4g}" for value in milliseconds), f"{rate:.3g}",
            f"{rate * row.draws:.3g}", "" if result.gib is None else f"{result.gib:.1f}",
            f"{result.flops / 1e12:.3g}", f"{used / 1e12:.3g}", f"{used / ceiling:.0%}", ratio,
        ]  # fmt: skip
        yield "| " + " | ".join(cells) + " |"
    if share is not None:
        yield f"\nThe VLM has {share:.0%} of the operations of Stage 1, ours; a warm cache leaves the rest."


def run(args: argparse.Namespace, folder: Path) -> Iterator[tuple[tuple[str, Row], Result]]:
    """Results one after the other."""
    if args.vlm in SIZES:
        args.vlm, args.random_vlm = str(qwen3_vl_2b_folder(folder, args.vlm)), True
    (folder / "episodes").mkdir()
    episodes = make_episodes(folder / "episodes", episodes=8, frames=40, side=args.image_size, key_frames=2)["jpeg"]
    for stage, mode in ((0, "frozen"), (1, "frozen"), (1, "lora"), (1, "full")):
        title = "Stage 1 (VA prior)" if stage == 0 else f"Stage 2 (VLA), VLM {mode}"
        if f"{stage + 1}{mode}" not in args.only and args.only:
            continue
        rows, usual = rows_of(stage, mode, args), PickPlaceCan.config.num_future
        for future in sorted({row.future or usual for row in rows}, reverse=True):
            bench = Bench(stage, mode, args, episodes, folder, future)
            for row in rows:
                if (row.future or usual) == future:
                    yield (title, row), bench.measure(row)
            del bench
            torch.cuda.empty_cache()


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", help="size of the expert (default: %(default)s)")
    parser.add_argument(
        "--vlm", default="qwen3-vl-2b-quarter", help=f"{', '.join(SIZES)}, a name or a folder (default: %(default)s)"
    )
    parser.add_argument("--random-vlm", action="store_true", help="random weights from the VLM's configuration alone")
    parser.add_argument("--stride", type=int, help="VLM layer stride (default: 1 with --vlm tiny, else 3)")
    parser.add_argument("--image-size", type=int, help="side of the images (default: 128 with --vlm tiny, else 256)")
    parser.add_argument("--bs", type=int, default=4)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--draws", type=int, default=4, help="of the rows with several (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--bf16", action="store_true", help="bfloat16 autocast")
    parser.add_argument("--half", action="store_true", help="also with bfloat16 autocast, where it is not that anyway")
    parser.add_argument("--future", type=int, help="also with chunks of so many steps")
    parser.add_argument("--gc", action="store_true", help="also with gradient checkpointing in the VLM")
    parser.add_argument("--compile", action="store_true", help="also with the expert compiled")
    parser.add_argument("--only", nargs="+", default=(), choices=("1frozen", "2frozen", "2lora", "2full"))
    parser.add_argument("--save", action="store_true", help=f"write the table to {RESULTS.name}/ as well")
    parser.add_argument("--attention", default="sdpa", choices=("sdpa", "xformers"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    args.stride = args.stride or (1 if args.vlm == "tiny" else 3)
    args.image_size = args.image_size or (128 if args.vlm == "tiny" else 256)  # 64 tokens per camera either way
    args.vlm_name = args.vlm
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    device = torch.device(args.device)
    ceiling = matmul_ceiling(device, torch.bfloat16 if args.bf16 else torch.float32)
    lines = [describe(args, ceiling), ""]
    print("\n".join(lines), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for line in table(run(args, Path(folder)), args, ceiling):
            print(line, flush=True)
            lines.append(line)
    if args.save:
        save_table("train_step", "Training steps", device, sys.argv[1:] if argv is None else argv, lines)


if __name__ == "__main__":
    main()
