"""What caching the VL stream saves, and where the time of a whole query goes.

First the denoising loop alone, in one run, on the base expert (10 layers, 768 wide; 128 vision and 34 language tokens;
1 history and 32 future steps of one arm), in float32: the baseline runs the joint pass over all tokens at every step
(``uncached_denoise.py``); every other row prints its largest difference from it beside its time.

Then ``get_action`` as a robot program calls it: seconds per stage. With ``--vlm qwen3-vl-2b-sizes``, the default on a
GPU, at the full size of Qwen3-VL-2B with random weights, two 256-pixel cameras, bfloat16.

    python benchmarks/denoise.py                     # any CPU; --no-compile leaves out minutes of compilation
    python benchmarks/denoise.py --save              # writes benchmarks/results/<date>_<machine>_denoise.md
"""

from __future__ import annotations

import argparse
import dataclasses
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from a clone, without an installation

from apt.infer.plan import Timing
from apt.infer.planner import TrajPlanner
from apt.infer.policy import Policy, pick_device, round_weights
from apt.model.config import VLAConfig
from apt.model.experts.apt import ActionExpert
from apt.model.experts.base import Modality, RobotState, VLMFeatures
from apt.model.experts.config import ExpertConfig
from apt.model.vla import VLA
from apt.presets import CONFIGS
from benchmarks.qwen_sizes import qwen3_vl_2b_folder
from benchmarks.report import machine, save_table
from benchmarks.uncached_denoise import uncached_predict
from data_utils.types import map_tensors

VISION, LANGUAGE, WIDTH_VLM = 128, 34, 2048
GROUPS = {"none": "eager", "compile": "compiled", "graphs": "graphed"}


def base_expert(seed: int = 0) -> ActionExpert:
    """The base expert with all zero-initialised parts filled, so that every input reaches the output."""
    torch.manual_seed(seed)
    expert = ActionExpert(ExpertConfig(768, 12, num_layers=10, input_dim=WIDTH_VLM)).eval().requires_grad_(False)
    for parameter in expert.parameters():
        parameter.add_(0.02 * torch.randn_like(parameter))
    return expert


def random_query(expert: ActionExpert, seed: int = 0) -> tuple[VLMFeatures, RobotState, torch.Tensor]:
    """Features of two cameras and an instruction, an arm's state, initial noise; batch 1."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    def poses(*shape: int) -> torch.Tensor:
        pose = torch.eye(4).repeat(*shape, 1, 1)
        pose[..., :3, 3] = 0.3 * normal(*shape, 3)
        return pose

    length = VISION + LANGUAGE
    camera = torch.full((1, length), -1)
    camera[0, :VISION] = torch.arange(VISION) // (VISION // 2)
    is_vision = camera >= 0
    features = VLMFeatures(
        inputs_embeds=normal(1, length, WIDTH_VLM),
        hidden_states={index: normal(1, length, WIDTH_VLM) for index in expert.reads.hidden_states},
        modality=torch.where(is_vision, int(Modality.VISION), int(Modality.LANGUAGE)),
        position=torch.arange(length).unsqueeze(0) - (is_vision.long().cumsum(1) - 1).clamp(min=0),
        camera=camera,
        norm_xy=torch.where(is_vision.unsqueeze(-1), 0.5 * normal(1, length, 2), 0.0),
        world_from_cam=poses(1, 2),
        camera_mask=torch.ones(1, 2, dtype=torch.bool),
    )
    history = torch.cat([poses(1, 1, 1).flatten(-2), torch.ones(1, 1, 1, 1)], dim=-1)
    robot = RobotState(history[:, -1, :, :16].unflatten(-1, (4, 4)), poses(1, 1), history, torch.ones(1, 1).bool())
    return features, robot, normal(1, 1, expert.config.num_future, 10)


def best_of(function: Callable[[], torch.Tensor], repeats: int, device: torch.device) -> tuple[float, torch.Tensor]:
    """Shortest time in seconds (others share the machine) and the result."""
    times = []
    for _ in range(repeats + 1):  # the first one warms up
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        began = time.perf_counter()
        result = function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - began)
    return min(times[1:]), result


@torch.inference_mode()
def compare_loops(args: argparse.Namespace, device: torch.device, say: Callable[[str], None]) -> None:
    """The first table: prefix and loop on given features."""
    expert = base_expert().to(device)
    features, robot, noise = map_tensors(random_query(expert), lambda tensor: tensor.to(device))
    run = expert.sampling_run(args.steps)

    def cached(run=run, prefix=expert.encode_prefix, step=None) -> torch.Tensor:
        begun = prefix(features, robot)
        return expert.decode(begun, expert.sample(begun.context, noise, run, step=step))

    baseline, wanted = best_of(
        lambda: uncached_predict(expert, features, robot, noise, args.steps), args.repeats, device
    )
    scale = wanted[..., [3, 7, 11]].abs().max()
    say(f"Denoising, base expert, {VISION + LANGUAGE} VL tokens, 33 action tokens, {args.steps} steps, {device}:")
    say(f"{'':<44}{'ms':>9}{'ratio':>8}{'max |diff|':>12}")
    ratios: dict[str, float] = {}

    def row(name: str, seconds: float, states: torch.Tensor) -> None:
        ratios[name] = baseline / seconds
        error = (states - wanted).abs().max()
        say(f"{name:<44}{1e3 * seconds:>9.1f}{baseline / seconds:>8.2f}{error:>12.1e}")

    row("uncached: joint pass at every step", baseline, wanted)
    row("cached, eager", *best_of(cached, args.repeats, device))
    compiled: dict[str, Callable] = {}
    if not args.no_compile:
        torch._dynamo.config.recompile_limit = 64
        for name, function in (("prefix", expert.encode_prefix), ("step", expert.denoise_step)):
            compiled[name] = torch.compile(function, fullgraph=True, dynamic=False)
        row("cached, compiled", *best_of(lambda: cached(**compiled), args.repeats, device))
    round_weights(expert)
    half = torch.autocast(device.type, dtype=torch.bfloat16)
    with half:
        run_half = expert.sampling_run(args.steps)
        row("cached, bf16, eager", *best_of(lambda: cached(run_half), args.repeats, device))
        if compiled:
            row("cached, bf16, compiled", *best_of(lambda: cached(run_half, **compiled), args.repeats, device))
    say(f"(positions reach {scale:.2f} m; differences are of 4x4 poses and openness)")
    say(f"ratio {ratios['cached, eager']:.1f}    cached eager float32, the same numbers")
    allowed = max(ratios, key=ratios.__getitem__)
    say(f"ratio {ratios[allowed]:.1f}    everything allowed: {allowed}")


def frame(config, number: int) -> dict:
    """A frame of random images in the form a robot hands over."""
    rng = np.random.default_rng(number)
    height, width = config.image_hw
    pose = np.eye(4)
    pose[:3, 3] = (0.4, 0.01 * number, 0.3)
    K = np.array([[width, 0, width / 2], [0, width, height / 2], [0, 0, 1]])
    camera = {
        name: {
            "camera": {"width": width, "height": height, "K": K},
            "data": {"color": rng.integers(0, 256, (height, width, 3), dtype=np.uint8), "wcT": np.eye(4), "seg": None},
        }
        for name in config.cameras
    }
    return {**camera, "ee_pose": pose, "gripper": 1.0, "timestamp": float(number)}


def whole_queries(args: argparse.Namespace, device: torch.device, folder: Path, say: Callable[[str], None]) -> None:
    """The second table: ``get_action`` by stages, and its percentiles."""
    if args.vlm == "qwen3-vl-2b-sizes":
        vlm, stride, size = str(qwen3_vl_2b_folder(folder)), 3, 256
    else:
        vlm, stride, size = args.vlm, 1, 128  # 64 tokens per camera either way
    config = VLAConfig(model="base", vlm=vlm, vlm_layer_stride=stride, action_step_embedding=True)
    half = device.type == "cuda"
    train_config = dataclasses.replace(CONFIGS["debug"], image_size=size, fp16=half)
    modes = ["none"] + ([] if args.no_compile else ["compile"] + (["graphs"] if device.type == "cuda" else []))
    names = [field.name for field in dataclasses.fields(Timing)]
    say("")
    precision = "bf16" if half else "float32"
    say(f"get_action, base expert, VLM {args.vlm}, two {size}-pixel cameras, {precision}, {device};")
    say("milliseconds, stages are medians:")
    say(f"{'':<22}{'p50':>9}{'p90':>9}{'p99':>9}" + "".join(f"{name:>12}" for name in names))
    for mode in modes:
        torch._dynamo.reset()
        torch.manual_seed(0)
        with torch.device(device):  # gigabytes of random numbers are drawn faster there
            model = VLA(config, frozen_dtype=torch.bfloat16 if half else torch.float32, random_vlm=vlm != "tiny")
        policy = Policy(model, train_config, device, mode)
        planner = TrajPlanner.of_policy(policy, ensemble=0)
        planner.set_prompt("Pick up the cereal box and place it on the pink plate beside the bowl.")
        for steps in (20, 10):
            planner.reset()
            totals, timings = [], []
            for number in range(args.queries + 3):
                planner.add_obs_frame(frame(planner.get_config(), number))
                began = time.perf_counter()
                plan = planner.run_inference(steps=steps)
                totals.append(time.perf_counter() - began)
                timings.append(plan.timing)
            totals, timings = totals[3:], timings[3:]  # the first ones compile and record
            stages = [1e3 * float(np.median([getattr(timing, name) for timing in timings])) for name in names]
            percentiles = 1e3 * np.percentile(totals, [50, 90, 99])
            say(
                f"{GROUPS[mode] + f', {steps} steps':<22}"
                + "".join(f"{value:>9.1f}" for value in percentiles)
                + "".join(f"{value:>12.2f}" for value in stages)
            )
        del model, policy, planner


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20, help="of the first table (default: %(default)s)")
    parser.add_argument(
        "--repeats", type=int, default=5, help="of each row; the shortest counts (default: %(default)s)"
    )
    parser.add_argument("--queries", type=int, help="of the second table (default: 200 on a GPU, else 10)")
    parser.add_argument("--no-compile", action="store_true", help="leave out compiled rows")
    parser.add_argument("--no-loop", action="store_true", help="leave out the first table")
    parser.add_argument("--vlm", help="tiny or qwen3-vl-2b-sizes (default: that on a GPU, else tiny)")
    parser.add_argument("--device", help="default: the GPU where there is one")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument("--save", action="store_true", help="also write benchmarks/results/<date>_<machine>_denoise.md")
    args = parser.parse_args(argv)
    if args.queries is not None and args.queries < 1:
        parser.error(f"--queries is {args.queries}; wanted 1 or more")
    if args.threads:
        torch.set_num_threads(args.threads)
    device = pick_device(args.device)
    args.queries = args.queries or (200 if device.type == "cuda" else 10)
    args.vlm = args.vlm or ("qwen3-vl-2b-sizes" if device.type == "cuda" else "tiny")
    lines: list[str] = []

    def say(line: str) -> None:
        print(line, flush=True)
        lines.append(line)

    say(f"{machine(device)}, torch {torch.__version__}, Python {platform.python_version()}")
    if not args.no_loop:
        compare_loops(args, device, say)
    with tempfile.TemporaryDirectory() as folder:
        whole_queries(args, device, Path(folder), say)
    if args.save:
        arguments = sys.argv[1:] if argv is None else argv
        save_table("denoise", "Denoising and whole queries", device, arguments, ["```", *lines, "```"])


if __name__ == "__main__":
    main()
