"""Arms of five, six and seven joints with the proportions of an SO-101, a UR5e and a Panda, as small MJCF files."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from data_utils.kinematics.robot import Robot, RobotSettings
from data_utils.yaml_file import build

H = np.pi / 2
# Per joint: where its body is in the one before, how it is turned (fixed axes x, y, z), and its limits, in radians. The
# lengths are the makers' own; the joint's axis is the body's z.
SIX = [
    ((0, 0, 0.1625), (0, 0, 0), (-2 * np.pi, 2 * np.pi)),
    ((0, 0, 0), (H, 0, 0), (-2 * np.pi, 2 * np.pi)),
    ((-0.425, 0, 0), (0, 0, 0), (-np.pi, np.pi)),
    ((-0.3922, 0, 0.1333), (0, 0, 0), (-2 * np.pi, 2 * np.pi)),
    ((0, -0.0997, 0), (H, 0, 0), (-2 * np.pi, 2 * np.pi)),
    ((0, 0.0996, 0), (-H, 0, 0), (-2 * np.pi, 2 * np.pi)),
]
SEVEN = [
    ((0, 0, 0.333), (0, 0, 0), (-2.8973, 2.8973)),
    ((0, 0, 0), (-H, 0, 0), (-1.7628, 1.7628)),
    ((0, -0.316, 0), (H, 0, 0), (-2.8973, 2.8973)),
    ((0.0825, 0, 0), (H, 0, 0), (-3.0718, -0.0698)),
    ((-0.0825, 0.384, 0), (-H, 0, 0), (-2.8973, 2.8973)),
    ((0, 0, 0), (H, 0, 0), (-0.0175, 3.7525)),
    ((0.088, 0, 0), (H, 0, 0), (-2.8973, 2.8973)),
]
FIVE = [
    ((0, 0, 0.06), (0, 0, 0), (-1.92, 1.92)),
    ((0.03, 0, 0.054), (-H, 0, 0), (-1.75, 1.75)),
    ((0.028, -0.1126, 0), (0, 0, 0), (-1.69, 1.69)),
    ((0.1349, 0.005, 0), (0, 0, 0), (-1.66, 1.66)),
    ((0.061, 0, 0), (0, H, 0), (-2.74, 2.84)),
]
ARMS = {5: FIVE, 6: SIX, 7: SEVEN}


def names(count: int) -> list[str]:
    return [f"joint{number}" for number in range(1, count + 1)]


def write_arm(path: Path, count: int, strange: bool = False) -> Path:
    """MJCF of the arm with so many joints and the site ``tip``.

    With ``strange``, what a description may also have: a base that is turned, an anchor beside the body's origin, an
    axis that is not z, a reference that is not 0, a body with two joints of which one slides, and missing meshes.
    """
    opened = ""
    for number, (place, turned, limits) in enumerate(ARMS[count], 1):
        pose = f'pos="{" ".join(map(str, place))}" euler="{" ".join(map(str, turned))}"'
        joint = f'name="joint{number}" range="{limits[0]} {limits[1]}"'
        more = (
            f'axis="0.6 0 0.8" pos="0.01 0.02 -0.03" ref="{0.2 + limits[0] / 2}"'
            if strange and number == 2
            else 'axis="0 0 1"'
        )
        opened += f'<body name="link{number}" {pose}><joint {joint} {more}/>'
        if strange and number == 3:
            opened += '<joint name="slide" type="slide" axis="0 1 1" pos="0.1 0 0" range="-0.1 0.2" ref="0.05"/>'
            opened += '<geom type="mesh" mesh="shell"/><camera name="eye"/>'
    tip = '<site name="tip" pos="0 0 0.1" euler="0 0.3 0.1"/>'
    base = '<body name="base" pos="0.1 0.2 0.3" euler="0.1 0.2 0.3">' if strange else '<body name="base">'
    asset = '<asset><mesh name="shell" file="not_here.stl"/></asset>' if strange else ""
    head = '<compiler angle="radian" eulerseq="XYZ"/><default><geom mass="1"/></default>'
    path.write_text(
        f"<mujoco>{head}{asset}<worldbody>{base}{opened}{tip}{'</body>' * (count + 1)}</worldbody></mujoco>"
    )
    return path


def robot(folder: Path, count: int, **settings) -> Robot:
    write_arm(folder / f"arm{count}.xml", count)
    told = {"description": f"arm{count}.xml", "end_effector": "tip", "joints": names(count), "units": "rad"}
    return Robot(build(RobotSettings, told | settings), folder)


def smooth(lower: np.ndarray, upper: np.ndarray, rows: int, seed: int, share: float) -> np.ndarray:
    """(T, n) positions of a motion through ``share`` of the range between limits, of at most a turn, anywhere in it."""
    rng, count = np.random.default_rng(seed), len(lower)
    half = np.minimum((upper - lower) / 2, np.pi)
    middle = (lower + upper) / 2 + rng.uniform(-1, 1, count) * half * (1 - share)
    time = np.linspace(0, 1, rows)[:, None]
    waves = (
        rng.normal(0, 0.45, count) * np.sin(2.6 * np.pi * k * time + rng.uniform(0, 2 * np.pi, count)) for k in (1, 2)
    )
    return middle + half * share * np.tanh(sum(waves))
