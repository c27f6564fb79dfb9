"""Are recorded numbers the positions of a robot's joints, in the units, the order and the signs that its file says?"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from data_utils.kinematics.robot import Robot

SLACK = 0.05  # of a joint's range, outside its limits: calibrations differ by as much
MOST_OUTSIDE = 0.1  # share of the readings
FULL_TURN = 2 * np.pi * 1.01
FASTEST_TURN, FASTEST_SLIDE = 15.0, 5.0  # radians, metres a second: no arm's joints
FASTEST_TIP = 4.0  # metres a second
MOST_JUMPS = 0.01  # share of the steps
FAR_COMMAND, FAR_SLIDE = 0.5, 0.2  # radians, metres between command and state, in the median


class Finding(NamedTuple):
    """What gives numbers away; where it is not certain it is remarked on alone."""

    what: str
    refused: bool


def suspicions(robot: Robot, numbers: np.ndarray, times: np.ndarray) -> list[Finding]:
    """Of rows (T, width) at increasing times (T,), in seconds."""
    found = [*_units(robot, numbers), *_limits(robot, numbers)]
    return found or [*_jumps(robot, numbers, times), *_tip_speed(robot, numbers, times)]


def far_commands(robot: Robot, numbers: np.ndarray, commands: np.ndarray, commanded: Robot) -> list[Finding]:
    """Of commands (T, width) to the robot ``commanded``, and rows (T, width) of where it is, of the same joints."""
    gaps = np.median(np.abs(commanded.positions(commands) - robot.positions(numbers)), axis=0)
    beyond = gaps / np.where(robot.chain.slides, FAR_SLIDE, FAR_COMMAND)
    joint = int(np.argmax(beyond))
    if beyond[joint] <= 1:
        return []
    what = (
        f"joint {robot.chain.names[joint]!r} is told to be {_position(robot, joint, gaps[joint])} from where it is, in"
    )
    return [Finding(f"{what} the median; are commands in another unit or order, or differences?", True)]


def _units(robot: Robot, numbers: np.ndarray) -> list[Finding]:
    """Radians that were called degrees, and LeRobot's -100 to 100 that were."""
    readings = robot.joint_numbers(numbers)[:, ~robot.chain.slides]
    units = robot.settings.units
    if units == "rad" or readings.shape[1] < 3:
        return []
    largest = np.abs(readings).max()
    if largest <= FULL_TURN:
        said = "degrees" if units == "deg" else "of LeRobot's -100 to 100"
        what = f"no joint reads more than {largest:.3g} {said}, which would be an arm that stands still at its zero"
        return [Finding(f"{what}; are they radians (units: rad)?", True)]
    ends = np.abs(np.abs(readings) - 100) < 1e-3
    if units == "deg" and ends.sum() >= 3 and largest < 100 + 1e-3:
        what = f"readings end at exactly -100 or 100, {int(ends.sum())} of them; are they LeRobot's (units: lerobot)?"
        return [Finding(what, True)]
    return []


def _limits(robot: Robot, numbers: np.ndarray) -> list[Finding]:
    positions = robot.positions(numbers)
    outside = _outside(robot, positions)
    shares = outside.mean(axis=0)
    if not shares.any():
        return []
    joint = int(np.argmax(shares))
    column, chain = positions[:, joint], robot.chain
    furthest = column[np.argmax(np.maximum(chain.lower[joint] - column, column - chain.upper[joint]))]
    what = f"joint {chain.names[joint]!r} goes to {_position(robot, joint, furthest)}, {shares[joint]:.0%} of it beyond"
    limits = " to ".join(f"{limit:.4g}" for limit in (chain.lower[joint], chain.upper[joint]))
    what = f"{what} its limits {limits} {'m' if chain.slides[joint] else 'rad'}"
    if shares[joint] > MOST_OUTSIDE:
        return [Finding(f"{what}; {_explanation(robot, numbers, joint)}", True)]
    return [Finding(what, False)]


def _outside(robot: Robot, positions: np.ndarray) -> np.ndarray:
    """(T, n) bool: further outside the limits than calibrations differ."""
    chain = robot.chain
    slack = np.where(np.isfinite(chain.upper - chain.lower), SLACK * (chain.upper - chain.lower), 0)
    return (positions < chain.lower - slack) | (positions > chain.upper + slack)


def _explanation(robot: Robot, numbers: np.ndarray, joint: int) -> str:
    """What would bring the readings within the limits, in words."""
    readings, settings = robot.joint_numbers(numbers), robot.settings

    def fits(numbers: np.ndarray, units: str) -> np.ndarray:
        scale, shift = robot.scale_and_shift(units)
        return _outside(robot, numbers * scale + shift).mean(axis=0) <= MOST_OUTSIDE

    if settings.units == "rad" and np.abs(readings[:, ~robot.chain.slides]).max(initial=0) > FULL_TURN:
        others = ["deg"] * bool(fits(readings, "deg").all()) + ["lerobot"] * bool(np.abs(readings).max() < 100.5)
        if others:
            return f"read as {' or '.join(f'units: {units}' for units in others)} they would be within"
    ways = []
    if fits(-readings, settings.units)[joint]:
        ways.append("the other sign")
    for other in range(readings.shape[1]):
        swapped = readings.copy()
        swapped[:, [joint, other]] = readings[:, [other, joint]]
        within = fits(swapped, settings.units)
        if within[joint] and within[other] and other != joint:
            ways.append(f"{robot.chain.names[other]!r} in its place (another order)")
            break
    if ways:
        return f"with {' or with '.join(ways)} it would be within"
    return "is it another joint, unit, sign or offset?"


def _jumps(robot: Robot, numbers: np.ndarray, times: np.ndarray) -> list[Finding]:
    """Joints that are somewhere else from one row to the next; a full turn is the same place."""
    if len(numbers) < 2:
        return []
    steps, slides = np.diff(robot.positions(numbers), axis=0), robot.chain.slides
    steps[:, ~slides] = (steps[:, ~slides] + np.pi) % (2 * np.pi) - np.pi
    speeds = np.abs(steps) / _gaps(times)[:, None]
    beyond = speeds > np.where(slides, FASTEST_SLIDE, FASTEST_TURN)
    if not beyond.any():
        return []
    row, joint = np.unravel_index(np.argmax(np.where(beyond, speeds, 0)), speeds.shape)
    share = beyond.any(axis=1).mean()
    by = _position(robot, joint, abs(steps[row, joint]))
    what = f"joint {robot.chain.names[joint]!r} moves by {by} from frame {row} to {row + 1}"
    what = f"{what}, {speeds[row, joint]:.3g} {'m/s' if slides[joint] else 'rad/s'}"
    what = f"{what}; so fast is {share:.1%} of the path, and no arm: are units, order or times others?"
    return [Finding(what, share > MOST_JUMPS and len(steps) >= 10)]


def _tip_speed(robot: Robot, numbers: np.ndarray, times: np.ndarray) -> list[Finding]:
    if len(numbers) < 2:
        return []
    places = robot.poses(numbers)[:, :3, 3]
    speeds = np.linalg.norm(np.diff(places, axis=0), axis=1) / _gaps(times)
    share = (speeds > FASTEST_TIP).mean()
    if not share:
        return []
    row = int(np.argmax(speeds))
    what = f"the end-effector moves at up to {speeds[row]:.3g} m/s (frame {row}), {share:.1%} of it faster than"
    what = f"{what} {FASTEST_TIP:g} m/s, and no arm's does: are units, order, signs or times others?"
    return [Finding(what, share > MOST_JUMPS and len(speeds) >= 10)]


def _gaps(times: np.ndarray) -> np.ndarray:
    """(T - 1,) seconds; late time stamps, which leave less, make no joint fast."""
    gaps = np.diff(times)
    return np.maximum(gaps, np.median(gaps))


def _position(robot: Robot, joint: int, value: float) -> str:
    return f"{value:.4g} m" if robot.chain.slides[joint] else f"{value:.4g} rad ({np.degrees(value):.4g} degrees)"
