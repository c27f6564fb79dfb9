"""What the quickstart leaves for a person: a loss curve, one picture, one video, and a printed summary."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402 - the back-end is chosen first

STAGES = (("va", "stage 0: VA prior"), ("vla", "stage 1: VLA"))


def read_losses(folder: Path) -> tuple[list[int], list[float]]:
    """Steps and total losses of a run's ``metrics.jsonl``."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "loss/total" in row]  # evaluations have lines of their own
    return [row["step"] for row in rows], [row["loss/total"] for row in rows]


def draw_losses(out: Path) -> dict[str, tuple[float, float]]:
    """``loss_curve.png``; returns the first and last logged loss of each stage."""
    figure, axes = plt.subplots(1, len(STAGES), figsize=(10, 3.5), sharey=True)
    ends = {}
    for axis, (name, title) in zip(axes, STAGES, strict=True):
        steps, losses = read_losses(out / "logs" / name)
        axis.plot(steps, losses)
        axis.set(title=title, xlabel="step", yscale="log")
        axis.grid(alpha=0.3, which="both")
        ends[name] = losses[0], losses[-1]
    axes[0].set_ylabel("loss")
    figure.tight_layout()
    figure.savefig(out / "loss_curve.png", dpi=120)
    plt.close(figure)
    return ends


def rate(values: dict) -> str:
    """A rate with its 95% interval."""
    low, high = values["interval"]
    return f"{values['rate']:.0%} [{low:.0%}, {high:.0%}]"


def choose_video(closed: Path) -> Path:
    """A successful episode's video where there is one, else the first."""
    rows = (closed / "episodes.csv").read_text().splitlines()
    success = rows[0].split(",").index("success")
    best = next((i for i, row in enumerate(rows[1:]) if row.split(",")[success] == "1"), 0)
    return closed / "videos" / f"episode_{best:03d}.mp4"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="the quickstart's folder")
    out = parser.parse_args().out
    ends = draw_losses(out)
    open_loop = json.loads((out / "open_loop" / "open_loop.json").read_text())
    closed = json.loads((out / "closed_loop" / "summary.json").read_text())
    shutil.copyfile(out / "open_loop" / "episode_000.png", out / "trajectories.png")
    shutil.copyfile(choose_video(out / "closed_loop"), out / "closed_loop.mp4")

    policy, mean = open_loop["policy"], open_loop["mean_motion"]
    total = closed
    lines = [
        *(f"{title:<20} loss {ends[name][0]:6.2f} -> {ends[name][1]:6.2f}" for name, title in STAGES),
        f"{'open loop':<20} position error {100 * policy['position_m']:.2f} cm; the mean motion's "
        f"{100 * mean['position_m']:.2f} cm (ratio {open_loop['position_ratio']:.2f})",
        f"{'':<20} rotation error {policy['rotation_deg']:.1f} deg; the mean motion's {mean['rotation_deg']:.1f}",
        f"{'':<20} gripper wrong {policy['gripper_wrong']:.0%} of the time; the mean motion's "
        f"{mean['gripper_wrong']:.0%}",
        f"{'closed loop':<20} success {rate(total['success'])}, named object approached first "
        f"{rate(total['approached_named'])}, of {total['episodes']} episodes",
        "",
        f"In {out}:",
        "  checkpoints/va, checkpoints/vla   ckpt_latest.pt of both stages, their configurations",
        "  logs                              TensorBoard: tensorboard --logdir logs",
        "  loss_curve.png                    both stages",
        "  trajectories.png, open_loop/      predicted (red) and recorded (green) paths on the cameras",
        "  closed_loop.mp4, closed_loop/     a success if there was one, every episode, results",
        "  demos                             the recorded episodes",
    ]
    text = "\n".join(lines)
    (out / "summary.txt").write_text(text + "\n")
    print("\n" + text)


if __name__ == "__main__":
    main()
