"""Queries per second of several sessions on one policy: one at a time, and in passes that they share.

    python benchmarks/batching.py                                       # any CPU, a minute: tiny expert, built-in VLM
    python benchmarks/batching.py --model base --vlm qwen3-vl-2b-sizes  # a GPU, bfloat16, random weights

Each session asks in a thread of its own, the next frame as soon as it has its answer, with an instruction of a length
of its own. "one at a time" is the baseline of the same run (``max_batch`` 1); the ratio is between the two columns of
queries per second in its row. Latencies are medians, "together" the mean number of queries in a pass.
"""

from __future__ import annotations

import argparse
import dataclasses
import platform
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from a clone, without an installation

from apt.infer.planner import TrajPlanner
from apt.infer.policy import Policy, pick_device
from apt.model.config import VLAConfig
from apt.model.vla import VLA
from apt.presets import CONFIGS
from benchmarks.denoise import frame
from benchmarks.qwen_sizes import qwen3_vl_2b_folder
from benchmarks.report import machine, save_table

WORDS = "put the red cube that lies beside the small bowl into the blue tray on the left now please".split()


def make_policy(args: argparse.Namespace, device: torch.device, folder: Path) -> Policy:
    large = args.vlm == "qwen3-vl-2b-sizes"
    vlm = str(qwen3_vl_2b_folder(folder)) if large else args.vlm
    config = VLAConfig(model=args.model, vlm=vlm, vlm_layer_stride=3 if large else 1, action_step_embedding=True)
    half = device.type == "cuda"
    trained = dataclasses.replace(CONFIGS["debug"], image_size=256 if large else 128, fp16=half)
    torch.manual_seed(0)
    with torch.device(device):
        model = VLA(config, frozen_dtype=torch.bfloat16 if half else torch.float32, random_vlm=args.vlm != "tiny")
    return Policy(model, trained, device)


def measure(policy: Policy, sessions: int, args: argparse.Namespace) -> tuple[float, float, float]:
    """Queries per second, median latency (s), and how many queries shared a pass on average."""
    latencies: list[float] = []
    together: list[int] = []
    infer = policy.queue._infer

    def counting(requests):
        together.append(len(requests))
        return infer(requests)

    policy.queue._infer = counting
    start = threading.Barrier(sessions + 1)

    def work(number: int) -> None:
        planner = TrajPlanner.of_policy(policy, ensemble=0, seed=number, steps=args.steps)
        planner.set_prompt(" ".join(WORDS[: 2 + number % len(WORDS)]))
        frames = [frame(planner.get_config(), query) for query in range(args.queries)]
        start.wait()
        for seen in frames:
            began = time.perf_counter()
            planner.run_inference(seen)
            latencies.append(time.perf_counter() - began)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(sessions)]
    for thread in threads:
        thread.start()
    start.wait()
    began = time.perf_counter()
    for thread in threads:
        thread.join()
    passed = time.perf_counter() - began
    return sessions * args.queries / passed, statistics.median(latencies), statistics.mean(together)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", help="the expert's size (default: %(default)s)")
    parser.add_argument("--vlm", default="tiny", help="tiny, blocks or qwen3-vl-2b-sizes (default: %(default)s)")
    parser.add_argument("--sessions", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--steps", type=int, default=10, help="of denoising (default: %(default)s)")
    parser.add_argument("--queries", type=int, default=20, help="of each session (default: %(default)s)")
    parser.add_argument("--max-wait-ms", type=float, default=5.0, help="see the service (default: %(default)s)")
    parser.add_argument("--device", help="default: the GPU where there is one")
    parser.add_argument(
        "--save", action="store_true", help="also write benchmarks/results/<date>_<machine>_batching.md"
    )
    args = parser.parse_args(argv)
    if min(*args.sessions, args.steps, args.queries) < 1:
        parser.error("--sessions, --steps and --queries want 1 or more")
    device = pick_device(args.device)
    lines: list[str] = []

    def say(line: str) -> None:
        print(line, flush=True)
        lines.append(line)

    say(f"{machine(device)}, torch {torch.__version__}, Python {platform.python_version()}")
    say(f"expert {args.model}, VLM {args.vlm}, {args.steps} denoising steps, {args.queries} queries of each session")
    say("")
    say("| sessions | one at a time, queries/s | shared passes | ratio | together | ms: one at a time | ms: shared |")
    say("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        policy = make_policy(args, device, Path(folder))
        policy.set_batching(16, 0.0)
        measure(
            policy, max(args.sessions), argparse.Namespace(**{**vars(args), "queries": 2})
        )  # warms up, at every length
        for sessions in args.sessions:
            policy.set_batching(1, 0.0)
            alone, slow, _ = measure(policy, sessions, args)
            policy.set_batching(16, 1e-3 * args.max_wait_ms)
            shared, fast, together = measure(policy, sessions, args)
            say(
                f"| {sessions} | {alone:.1f} | {shared:.1f} | {shared / alone:.2f} | {together:.1f} "
                f"| {1e3 * slow:.0f} | {1e3 * fast:.0f} |"
            )
    if args.save:
        save_table("batching", "Queries of several sessions", device, sys.argv[1:] if argv is None else argv, lines)


if __name__ == "__main__":
    main()
