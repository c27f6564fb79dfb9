"""Which of set-up, data, training or control is off? Asked of a policy that is known to succeed, and of one's own run.

    python -m apt.infer.doctor                                       # is this machine all right?
    python -m apt.infer.doctor --episodes DIR --run checkpoints/APT/my_vla --log logs/APT/my_vla --results results/my

The shipped policy looks at a recorded episode, whose next steps it should foresee about as well as where it was made,
and moves the simulated robot. What of one's own is named is held against what goes well in docs/troubleshooting.md.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from apt.checkpoint import load_checkpoint
from apt.hub_folder import is_exported
from apt.infer.open_loop import evaluate as open_loop
from data_utils.checks.checker import Request, check_files
from data_utils.data_loc import find_episodes
from data_utils.datasets import get_dataset_class
from data_utils.errors import DataError
from data_utils.words import counted
from train_utils.places import LATEST

ASSETS = Path(__file__).resolve().parents[2] / "assets"
POLICY = ASSETS / "models" / "blocks_policy"
EPISODES = ASSETS / "episodes"
DATASET = "Blocks"
EVALUATION = "examples.blocks.evaluate"  # a command, in a process of its own
DENOISING_STEPS = 10
FRAMES_APART = 6

# What the shipped policy does on the shipped episode where all is well, with room for other libraries and processors.
POSITION_CM, GRIPPER_WRONG = 3.5, 0.10
SUCCESSES, TRIALS = 3, 6  # at least so many of its episodes
FILES_AT_MOST = 50


@dataclass(frozen=True)
class Finding:
    """What was looked at, and whether it is well; ``None``: only told."""

    part: str
    well: bool | None
    text: str

    def __str__(self) -> str:
        return f"{ {True: 'ok', False: 'OFF', None: '-'}[self.well]:<4} {self.part:<9} {self.text}"


def examine_setup() -> Iterator[Finding]:
    """Versions, and whether the shipped policy foresees the shipped episode."""
    import diffusers
    import transformers

    from apt.infer.planner import TrajPlanner  # seconds of imports, which --help need not wait for

    where = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}"
    yield Finding("set-up", None, f"{versions}, diffusers {diffusers.__version__}; {where}")
    if not POLICY.is_dir():
        yield Finding("set-up", False, f"{POLICY} is not there; run from a whole clone of the repository")
        return
    planner = TrajPlanner(POLICY, device="cpu", ensemble=0, steps=DENOISING_STEPS)
    config = planner.get_config()
    dataset = get_dataset_class(DATASET)(find_episodes(EPISODES, "the clone lacks it"), config=config, train=False)
    began = time.monotonic()
    still = torch.zeros(config.num_future, 1, 10)  # the mean motion is of no interest here
    found = open_loop(planner, dataset, still, FRAMES_APART, None)["policy"]
    queries = -(-dataset.episode_length(0) // FRAMES_APART)
    seconds = (time.monotonic() - began) / queries
    position, gripper = 100 * found["position_m"], found["gripper_wrong"]
    yield Finding(
        "set-up",
        position <= POSITION_CM and gripper <= GRIPPER_WRONG,
        f"the shipped policy is {position:.1f} cm off over {config.num_future} steps of a recorded episode (well: up "
        f"to {POSITION_CM:g}), gripper wrong in {gripper:.0%} (up to {GRIPPER_WRONG:.0%}); {1000 * seconds:.0f} ms a "
        "query",
    )


def examine_control() -> Iterator[Finding]:
    """Whether the shipped policy moves the simulated robot as it should."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", EVALUATION, "--split", "SO", "--episodes", str(TRIALS), "--seed", "7"]
        done = subprocess.run([*command, "--out", f"{folder}/out"], capture_output=True, text=True)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
            yield Finding("control", False, f"the simulated robot does not run: {reason}")
            return
        summary = json.loads(Path(folder, "out", "summary.json").read_text(encoding="utf-8"))
    count = summary["success"]["count"]
    yield Finding(
        "control",
        count >= SUCCESSES,
        f"the shipped policy succeeds in {count} of {TRIALS} simulated episodes (well: at least {SUCCESSES})",
    )


def examine_data(folder: Path) -> Iterator[Finding]:
    """Whether episode files are sound, and what is unusual about them; of a large set, evenly spread files."""
    files = find_episodes(folder, "name a folder of episode files")
    files = files[:: -(-len(files) // FILES_AT_MOST)]
    reports = check_files([Request(str(file), "sampled") for file in files])
    broken = [(file, report) for file, report in zip(files, reports, strict=True) if report.faults]
    for file, report in broken[:3]:
        yield Finding("data", False, f"{Path(file).name}: {report.faults[0].message}")
    unusual: dict[str, list[str]] = {}
    for report in reports:
        for warning in report.warnings:
            unusual.setdefault(warning.rule, []).append(warning.message)
    for messages in unusual.values():
        few = len(messages) < len(files) / 10
        yield Finding("data", None if few else False, f"in {counted(len(messages), 'file')}: {messages[0]}")
    lengths = [report.length for report in reports]
    yield Finding(
        "data",
        not broken,
        f"{counted(len(files), 'file')} looked at, {len(broken)} with faults; {min(lengths)} to {max(lengths)} frames "
        "(more: python -m data_utils.inspect)",
    )


def examine_training(run: Path, log: Path) -> Iterator[Finding]:
    """Whether a run's curves look as those of a run that goes well."""
    content = load_checkpoint(run / LATEST if run.is_dir() and not is_exported(run) else run)
    rows = [json.loads(line) for line in (log / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    losses = [(row["step"], row["loss/total"]) for row in rows if "loss/total" in row]
    held_out = [(row["step"], row["eval/loss"]) for row in rows if "eval/loss" in row]
    skipped = max((row.get("train/skipped_steps", 0) for row in rows), default=0)
    waiting = [row["train/data_wait"] for row in rows if "train/data_wait" in row]
    if len(losses) < 6:
        yield Finding("training", None, f"{len(losses)} lines of losses in {log}: too few to judge")
        return
    third = len(losses) // 3
    first, last = (sum(loss for _, loss in part) / third for part in (losses[:third], losses[-third:]))
    yield Finding(
        "training",
        last < 0.8 * first,
        f"step {content['current_iters']}: the loss went from {first:.2f} to {last:.2f} (means of the first and the "
        "last third; well: it falls by a fifth or more)",
    )
    if skipped:
        yield Finding("training", False, f"{counted(int(skipped), 'step')} had a non-finite loss or gradient")
    if len(held_out) >= 3:
        best_step, best = min(held_out, key=lambda pair: pair[1])
        yield Finding(
            "training",
            held_out[-1][1] < 1.15 * best,
            f"held out: loss {held_out[-1][1]:.2f} now, {best:.2f} at best (step {best_step}); far above it the policy "
            "learns its episodes by heart: more of them, or stop there (ckpt_best.pt)",
        )
    elif not held_out:
        yield Finding("training", None, "nothing is held out: train with --eval_split 0.05 to know what is learned")
    if waiting and sum(waiting) / len(waiting) > 0.4:
        yield Finding("training", None, f"{sum(waiting) / len(waiting):.0%} of the time is waiting for data: --workers")


def examine_results(folder: Path) -> Iterator[Finding]:
    """What fails in an evaluation in closed loop: language, grasping, or placing."""
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    episodes, success = summary["episodes"], summary["success"]["count"]
    named = summary["approached_named"]["count"]
    well = success >= 0.6 * episodes
    if well:
        advice = "it works"
    elif named < 0.7 * episodes:
        advice = "it goes to the wrong thing: language (Stage 2 too short, or a VLM that cannot point there)"
    else:
        advice = "it goes to the right thing and fails there: precision (more demonstrations, also of second attempts)"
    yield Finding(
        "results", well, f"success {success} of {episodes}, the named object first in {named} of {episodes}: {advice}"
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m apt.infer.doctor", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--episodes", type=Path, help="folder of one's own episode files")
    parser.add_argument("--run", type=Path, help="folder of one's own run, with its ckpt_latest.pt")
    parser.add_argument("--log", type=Path, help="the run's folder of logs, with its metrics.jsonl")
    parser.add_argument("--results", type=Path, help="folder of an evaluation in closed loop, with its summary.json")
    parser.add_argument("--no-simulator", action="store_true", help="leave the simulated robot out")
    args = parser.parse_args(argv)
    if (args.run is None) != (args.log is None):
        parser.error("--run and --log go together")
    parts = [examine_setup()]
    if not args.no_simulator:
        parts.append(examine_control())
    if args.episodes is not None:
        parts.append(examine_data(args.episodes))
    if args.run is not None:
        parts.append(examine_training(args.run, args.log))
    if args.results is not None:
        parts.append(examine_results(args.results))
    off: list[str] = []
    try:
        for part in parts:
            for finding in part:
                print(finding, flush=True)
                if finding.well is False and finding.part not in off:
                    off.append(finding.part)
    except (ValueError, OSError, DataError, KeyError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"off: {', '.join(off)}; docs/troubleshooting.md says what to look at" if off else "nothing found to be off")
    return 1 if off else 0


if __name__ == "__main__":
    sys.exit(main())
