"""What each architecture of the action expert costs at equal width and depth, in one table of one run.

    python benchmarks/architectures.py                                              # any CPU, under three minutes
    python benchmarks/architectures.py --model base --vlm qwen3-vl-2b-sizes --bs 32 --bf16 --compile graphs --save

One row per architecture of the registry, all on one frozen VLM with random weights:

    train      a step: VLM, expert, backward pass, optimiser; operations, and milliseconds
    query      what a robot waits for, by stage: VLM, the expert's prefix, denoising. In the usual steps of each
               objective (ddim 20, flow 10 or 4), and all in the same number (--steps)
    ratio      against ``apt`` in the same run, over 1 is faster

By default the VLM is a quarter as wide as Qwen3-VL-2B beside the expert "tiny", a quarter as wide as "base", so that
both take the shares that they really take. Architectures that read the last decoder layer run the VLM a little further
than others. Architectures take turns within each repetition, and times are medians.

Let nothing else run on the machine meanwhile: with another process on its cores or its GPU the numbers mean nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from a clone, without an installation

from apt.infer.policy import Policy
from apt.infer.stages import COMPILE_MODES
from apt.model.config import SIZES, VLAConfig
from apt.model.experts.registry import ARCHITECTURES
from apt.model.objectives.registry import OBJECTIVES, make_objective
from apt.model.vla import VLA
from apt.presets import CONFIGS
from benchmarks.episodes import make_episodes
from benchmarks.flops import count_flops, seconds_of
from benchmarks.qwen_sizes import SIZES as VLM_SIZES
from benchmarks.qwen_sizes import qwen3_vl_2b_folder
from benchmarks.report import RESULTS, machine, save_table
from data_utils.batches.collate import Collator
from data_utils.datasets import PickPlaceCan
from data_utils.types import Batch, Sample
from train_utils.backend import DDPBackend
from train_utils.optim import build_optimizer

BASELINE = "apt"
QUERY_STAGES = ("vlm", "prefix", "denoise")
PROMPT = "Pick up the cereal box and place it on the pink plate beside the bowl."


@dataclasses.dataclass
class Costs:
    """Of one architecture; times are samples in seconds, one per repetition."""

    blocks: int = 0
    parameters: int = 0
    trained: int = 0
    train_flops: float = 0.0
    query_flops: float = 0.0  # of as many steps as all take
    expert_flops: float = 0.0  # of those, without the VLM's
    train: list[float] = dataclasses.field(default_factory=list)
    queries: dict[str, list[float]] = dataclasses.field(default_factory=dict)  # by the objective's name, and "equal"
    stages: list[dict[str, float]] = dataclasses.field(default_factory=list)  # of "equal"
    steps: dict[str, int] = dataclasses.field(default_factory=dict)  # usual ones, by the objective's name


class Contender:
    """An architecture's policy, first to train, then to ask.

    Args:
        shares: another contender, whose VLM is used, so that memory holds one.
    """

    def __init__(self, arch: str, args: argparse.Namespace, samples: list[Sample], shares: Contender | None) -> None:
        self.args, self.device, self.costs = args, torch.device(args.device), Costs()
        torch.manual_seed(0)
        config = VLAConfig(
            model=args.model, arch=arch, objective=args.objective, vlm=args.vlm, vlm_layer_stride=args.stride,
            train_stage=args.stage, action_step_embedding=True,
        )  # fmt: skip
        half = args.bf16 and self.device.type == "cuda"
        with self.device:  # random weights of full size are made there in a moment
            self.model = VLA(config, torch.bfloat16 if half else torch.float32, random_vlm=args.random_vlm).train()
        if shares is not None:
            self.model.vlm.encoder = shares.model.vlm.encoder
        self.model.to(self.device)
        self._samples = samples
        self._batch = self._collate(samples).to(self.device)
        self._policy: Policy | None = None
        self._backend = DDPBackend(self.device.type)
        self._backend.prepare(self.model, build_optimizer(self.model, 1e-4, 1e-2))
        expert = self.model.expert
        self.costs.blocks = len(expert.blocks)
        self.costs.parameters = sum(p.numel() for p in expert.parameters())
        self.costs.trained = sum(p.numel() for p in expert.parameters() if p.requires_grad)

    def _collate(self, samples: list[Sample], pad_multiple: int = 1) -> Batch:
        tokenize = self.model.vlm.prompt_tokenizer(samples[0].rgb.shape[-2:])
        return Collator(tokenize, tokenize.pad_id, samples[0].rgb.shape[1], 1, pad_multiple)(samples)

    def _train_step(self, update: bool = True) -> None:
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.args.bf16):
            loss = self.model(self._batch).total
        self._backend.backward(loss)
        if update:
            self._backend.step(1.0)

    def count_training(self) -> None:
        self.costs.train_flops = count_flops(lambda: self._train_step(update=False))
        self.model.zero_grad(set_to_none=True)

    def time_training(self, keep: bool) -> None:
        seconds = seconds_of(self.device, self._train_step)
        if keep:
            self.costs.train.append(seconds)

    def serve(self) -> None:
        """From here on the policy answers queries; it does not train any more."""
        self._backend = None
        self.model.zero_grad(set_to_none=True)
        config = dataclasses.replace(CONFIGS["debug"], image_size=self.args.image_size, fp16=self.args.bf16)
        self._policy = Policy(self.model, config, self.device, self.args.compile)
        self._observation = self._collate(self._samples[:1], self._policy.pad_multiple).observation
        for name in OBJECTIVES:
            self.costs.steps[name] = make_objective(name, flow_steps=self.model.expert.flow_steps).inference_timesteps

    def _query(self, steps: int) -> dict[str, float]:
        request = self._policy.request(self._observation, self._policy.generator(0), steps=steps)
        return self._policy.infer([request])[1]

    def count_query(self) -> None:
        """Eagerly: the counter does not see what compiled code does."""
        observation = self._observation.to(self.device)
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.args.bf16):
            whole = count_flops(lambda: self.model.predict(observation, steps=self.args.steps))
            self.costs.query_flops = whole
            self.costs.expert_flops = whole - count_flops(lambda: self.model.vlm(observation))

    def time_queries(self, keep: bool) -> None:
        """A step costs the same whatever was trained and whichever sampler takes it: only their number differs."""
        for name, steps in {**self.costs.steps, "equal": self.args.steps}.items():
            stages = self._query(steps)
            if keep:
                self.costs.queries.setdefault(name, []).append(sum(stages.values()))
                if name == "equal":
                    self.costs.stages.append(stages)


def run(args: argparse.Namespace, folder: Path) -> dict[str, Costs]:
    """Every architecture's costs, measured in turns."""
    if args.vlm in VLM_SIZES:
        args.vlm, args.random_vlm = str(qwen3_vl_2b_folder(folder, args.vlm)), True
    samples = draw_samples(folder, args)
    contenders: dict[str, Contender] = {}
    for arch in ARCHITECTURES:
        contenders[arch] = Contender(arch, args, samples, contenders.get(BASELINE))
    in_turns(contenders, args.repeat, Contender.count_training, Contender.time_training)
    for contender in contenders.values():
        contender.serve()
    in_turns(contenders, args.repeat, Contender.count_query, Contender.time_queries)
    return {arch: contender.costs for arch, contender in contenders.items()}


def in_turns(
    contenders: dict[str, Contender],
    repeat: int,
    count: Callable[[Contender], None],
    measure: Callable[[Contender, bool], None],
) -> None:
    """Count once, warm up once, then measure one after the other, each repetition beginning with another one."""
    order = list(contenders.values())
    for contender in order:
        count(contender)
    for repetition in range(-1, repeat):
        first = repetition % len(order)
        for contender in (*order[first:], *order[:first]):
            measure(contender, repetition >= 0)


def draw_samples(folder: Path, args: argparse.Namespace) -> list[Sample]:
    """A batch of frames of synthetic episodes."""
    (folder / "episodes").mkdir()
    side = args.image_size
    paths = make_episodes(folder / "episodes", episodes=2, frames=40, side=side, key_frames=2)["jpeg"]
    config = dataclasses.replace(PickPlaceCan.config, image_hw=(side, side))
    dataset = PickPlaceCan(list(map(str, paths)), config=config, train=False)
    rng = np.random.default_rng(0)
    return [dataclasses.replace(dataset.sample(index % len(paths), rng), prompt=PROMPT) for index in range(args.bs)]


def table(costs: dict[str, Costs], args: argparse.Namespace) -> Iterator[str]:
    """Lines of a Markdown table."""
    heads = ["arch", "blocks", "expert M", "trained M", "train GFLOP", "train ms", "ratio"]
    heads += [f"query GFLOP, {args.steps} steps", "of them expert", *(f"{stage} ms" for stage in QUERY_STAGES)]
    for name in (f"{args.steps} steps", *OBJECTIVES):
        heads += [f"query ms, {name}", "ratio"]
    yield "| " + " | ".join(heads) + " |"
    yield "|---" * len(heads) + "|"
    base = costs[BASELINE]
    for arch, own in costs.items():
        cells = [arch, str(own.blocks), f"{own.parameters / 1e6:.2f}", f"{own.trained / 1e6:.2f}"]
        cells += [f"{own.train_flops / 1e9:.4g}", *timed(own.train, base.train)]
        cells += [f"{flops / 1e9:.4g}" for flops in (own.query_flops, own.expert_flops)]
        cells += [f"{1e3 * statistics.median(times[stage] for times in own.stages):.4g}" for stage in QUERY_STAGES]
        cells += timed(own.queries["equal"], base.queries["equal"])
        for name in OBJECTIVES:
            milliseconds, ratio = timed(own.queries[name], base.queries[name])
            cells += [f"{milliseconds} ({own.steps[name]} steps)", ratio]
        yield "| " + " | ".join(cells) + " |"


def timed(own: list[float], base: list[float]) -> tuple[str, str]:
    """The median in milliseconds, and how many times as fast as the baseline it is."""
    median = statistics.median(own)
    return f"{1e3 * median:.4g}", "1" if own is base else f"{statistics.median(base) / median:.2f}x {BASELINE}"


def describe(args: argparse.Namespace) -> str:
    precision, queries = "bf16" if args.bf16 else "fp32", "eager" if args.compile == "none" else args.compile
    return (
        f"{args.model} expert, Stage {args.stage + 1}, trained with {args.objective}, frozen VLM {args.vlm_name} "
        f"(stride {args.stride}), batch {args.bs}, two {args.image_size}-pixel cameras, {precision}, queries "
        f"{queries}, on {machine(torch.device(args.device))}, torch {torch.__version__}; medians of {args.repeat}"
    )


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default="tiny", choices=sorted(SIZES), help="size of the expert (default: %(default)s)")
    add(
        "--vlm", default="qwen3-vl-2b-quarter", help=f"tiny, {', '.join(VLM_SIZES)}, or a folder (default: %(default)s)"
    )
    add("--stride", type=int, help="VLM layer stride (default: 1 with --vlm tiny, else 3)")
    add("--image-size", type=int, help="side of the images (default: 128 with --vlm tiny, else 256)")
    add("--stage", type=int, default=1, choices=(0, 1), help="0: VA prior, 1: VLA (default: %(default)s)")
    add("--objective", default="ddim", choices=OBJECTIVES, help="of the training step (default: %(default)s)")
    add("--bs", type=int, default=2, help="samples of a training step (default: %(default)s)")
    add("--steps", type=int, default=10, help="denoising steps that all are asked for (default: %(default)s)")
    add("--repeat", type=int, default=5, help="measurements of each time (default: %(default)s)")
    add("--bf16", action="store_true", help="bfloat16 autocast")
    add("--compile", default="none", choices=COMPILE_MODES, help="of queries (default: %(default)s)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--save", action="store_true", help=f"write the table to {RESULTS.name}/ as well")
    args = parser.parse_args(argv)
    for name in ("bs", "steps", "repeat"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} is {getattr(args, name)}; wanted 1 or more")
    args.stride = args.stride or (1 if args.vlm == "tiny" else 3)
    args.image_size = args.image_size or (128 if args.vlm == "tiny" else 256)  # 64 tokens per camera either way
    args.vlm_name, args.random_vlm = args.vlm, False
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    lines = [describe(args), ""]
    print("\n".join(lines), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        lines += table(run(args, Path(folder)), args)
    print("\n".join(lines[2:]))
    if args.save:
        arguments = sys.argv[1:] if argv is None else argv
        save_table("architectures", "Architectures", torch.device(args.device), arguments, lines)


if __name__ == "__main__":
    main()
