"""What ``python -m data_utils.inspect`` prints: an episode, a set of them, faults by rule."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from data_utils.checks.contents import CameraContents, Contents
from data_utils.words import counted

if TYPE_CHECKING:
    from data_utils.inspect.speed import Speed  # needs torch, which takes seconds to import

LISTED_PROMPTS = 10
BARS, BAR = 8, 40  # of a distribution; characters of the longest bar


def episode_lines(contents: Contents, counts_steps: bool = False) -> list[str]:
    """A description of one episode.

    Args:
        counts_steps: timestamps are control steps, not seconds.
    """
    arms = counted(contents.num_ee, "end-effector")
    if contents.ee_indices is not None:
        arms += f", of which arms: {', '.join(map(str, contents.ee_indices))}"
    commands = "with commanded poses" if contents.desired else "no commanded poses"
    units = ("control steps", "step") if counts_steps else ("s", "second")
    version = f"schema version {contents.version}" if contents.version else "no schema version (read as it is)"
    lines = [
        f"  {version}, {size_text(contents.size)}",
        f"  {contents.frames} frames, {contents.seconds:.4g} {units[0]}, {contents.rate:.4g} frames per {units[1]}",
        f"  {arms}, {commands}",
    ]
    width = max((len(camera) for camera in contents.cameras), default=0)
    lines += [f"  camera {name:{width}}  {_camera_text(camera)}" for name, camera in contents.cameras.items()]
    lines += [f"  {text}" for name, camera in contents.cameras.items() for text in _seen_texts(name, camera, contents)]
    lines.append(f"  prompt “{contents.prompts[0]}”")
    lines += [f"    or   “{text}”" for text in contents.prompts[1:LISTED_PROMPTS]]
    if len(contents.prompts) > LISTED_PROMPTS:
        lines.append(f"    and {counted(len(contents.prompts) - LISTED_PROMPTS, 'more paraphrase')}")
    lines += [f"  from frame {start}: “{text}”" for start, text in contents.subtasks]
    lines += [f"  {name}: {text}" for name, text in contents.attributes.items()]
    return lines


def set_lines(all_contents: Sequence[Contents], num_files: int, counts_steps: bool = False) -> list[str]:
    """A description of many episodes; ``counts_steps`` as above."""
    lengths = np.array([contents.frames for contents in all_contents])
    length = sum(contents.seconds for contents in all_contents)
    length = f"{length:.6g} control steps" if counts_steps else f"{length / 3600:.3g} h"
    lines = [f"{counted(num_files, 'episode')}, {size_text(sum(contents.size for contents in all_contents))}"]
    if not all_contents:
        return lines
    lines.append(f"  {lengths.sum()} frames, {length} by their timestamps")
    lines += _distribution(lengths)
    kinds = Counter(_kind_text(contents) for contents in all_contents)
    lines += [f"  {count} x {kind}" for kind, count in kinds.most_common(LISTED_PROMPTS)]
    prompts = Counter(contents.prompts[0] for contents in all_contents)
    lines.append("  one prompt" if len(prompts) == 1 else f"  {len(prompts)} different prompts")
    lines += [f"    {count:6} “{text}”" for text, count in prompts.most_common(LISTED_PROMPTS)]
    if len(prompts) > LISTED_PROMPTS:
        lines.append(f"           and {len(prompts) - LISTED_PROMPTS} more")
    return lines


def count_text(num_faulty: int, num_files: int, rules: Iterable[str]) -> str:
    """The last line; ``rules`` holds, per faulty episode, the rules that it breaks."""
    if not num_faulty:
        return f"{num_files} of {num_files} episodes without faults" if num_files > 1 else "no faults"
    counts = ", ".join(f"{count} {rule}" for rule, count in Counter(rules).most_common())
    if num_files == 1:
        return f"the episode has faults ({counts})"
    have = "has" if num_faulty == 1 else "have"
    return f"{num_faulty} of {num_files} episodes {have} faults ({counts})"


def speed_lines(speed: Speed, all_contents: Sequence[Contents]) -> list[str]:
    """A table of what was measured."""
    lines = [
        f"  {speed.samples_per_second:.1f} samples/s in one process",
        f"  {speed.cold_open_ms:.1f} ms to open an episode that is not in memory, with a frame of each camera",
    ]
    for name, measured in speed.cameras.items():
        kinds = sorted({contents.cameras[name].storage for contents in all_contents if name in contents.cameras})
        lines.append(f"  {measured.milliseconds:.2f} ms per random frame of {name} ({', '.join(kinds)})")
    return lines


def size_text(size: float) -> str:
    """Bytes in a unit that fits."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


def _camera_text(camera: CameraContents) -> str:
    parts = [_pixels_text(camera), f"{camera.storage}, {size_text(camera.bytes_per_frame)} per frame"]
    parts.append("moves" if camera.moves else "fixed")
    if camera.masked:
        parts.append("with masks")
    if camera.pairing_error is not None:
        shared = f", {camera.rows_sharing} with the frame of the row before" if camera.rows_sharing else ""
        parts.append(f"rows within {1000 * camera.pairing_error:.3g} ms of their frames{shared}")
    return "; ".join(parts) + (f"; {camera.video}" if camera.video else "")


def _kind_text(contents: Contents) -> str:
    cameras = ", ".join(f"{name} {_pixels_text(camera)} {camera.storage}" for name, camera in contents.cameras.items())
    commands = ", commanded poses" if contents.desired else ""
    return f"{counted(contents.num_ee, 'end-effector')}{commands}; {cameras}"


def _pixels_text(camera: CameraContents) -> str:
    return f"{camera.hw[1]} x {camera.hw[0]}" if camera.hw[0] else "unreadable"


def _seen_texts(name: str, camera: CameraContents, contents: Contents) -> list[str]:
    arms = contents.arms
    whose = ["end-effector"] if contents.num_ee == 1 else [f"end-effector {arm}" for arm in arms]
    return [f"{which} in {name}'s image in {frames} of {counted(contents.frames, 'frame')}"
            for which, frames in zip(whose, camera.frames_with_ee, strict=False)]  # fmt: skip


def _distribution(lengths: np.ndarray) -> list[str]:
    """A histogram of (N,) lengths in frames."""
    if lengths.min() == lengths.max():
        return [f"  all of {lengths[0]} frames"]
    least, median, most = int(lengths.min()), float(np.median(lengths)), int(lengths.max())
    lines = [f"  {least} to {most} frames long, half of them up to {median:.0f}"]
    if len(lengths) < 2 * BARS:
        return lines
    counts, edges = np.histogram(lengths, np.unique(np.linspace(least, most + 1, BARS + 1).round()))
    for count, low, high in zip(counts, edges[:-1], edges[1:], strict=True):
        bar = "#" * round(BAR * count / counts.max())
        lines.append(f"    {low:7.0f} to {high - 1:7.0f} {count:7} {bar}".rstrip())
    return lines
