"""Joint positions that bring the hand along a path of poses: each from the one before, position before orientation.

Every row is solved by damped least squares (Nakamura and Hanafusa 1986) in two tasks of which the second has what the
first leaves free (Siciliano and Slotine 1991): where a pose cannot be reached, as by five joints most cannot, the
position is met and the orientation as nearly as it can be. A joint that would leave its limits is put on them, and the
others take over its share (Flacco, De Luca and Khatib 2012). The limits of one row are also how far joints may move
since the row before, so that a path never jumps from one solution to another: it stays behind, and says so. A row is
begun where the joints would be if they went on as they did.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.spatial.transform import Rotation

from data_utils.kinematics.chain import Chain

LARGEST_TURN, LARGEST_SLIDE = 0.5, 0.1  # radians, metres from one row to the next
LARGEST_PART = 0.3  # of a step, radians and metres, towards an orientation: where it cannot be met, steps would grow
MOST_STEPS = 40  # of one row; a path's rows take two or three
MOST_TRIALS = 64  # starting positions, where none is given
NEAR = (1e-5, 1e-4)  # metres, radians: well within any tolerance
DAMPING = 1e-6  # of both tasks, m^2 and radians^2: singular values below a thousandth count little
POSITION_COUNTS = 100.0  # a metre of error as this many squared radians, in judging a step
# Left of a row that is solved: a tenth of a millimetre, and a thousandth of a radian.
GOOD = POSITION_COUNTS * 1e-4 + 1e-3**2
# With more than six joints, how far (of half their range) and by which power of their distance joints are drawn to the
# middle of their limits at every row, as far as poses leave it open: the first that leads along the whole path.
PULLS = ((0.02, 1), (0.1, 1), (1.0, 5))


@dataclass(frozen=True)
class Tolerance:
    """How near is there.

    Args:
        position: metres.
        rotation: radians; infinite where the orientation does not matter, as for arms of five joints it may have to be.
    """

    position: float = 1e-3
    rotation: float = float(np.radians(0.2))


@dataclass(frozen=True)
class Followed:
    """What came of following a path.

    Args:
        positions: (T, n) of the joints, within their limits.
        position_error: (T,) metres between the pose that is wanted and that at these positions.
        rotation_error: (T,) radians.
        reached: (T,) bool, both within the tolerance.
    """

    positions: np.ndarray
    position_error: np.ndarray
    rotation_error: np.ndarray
    reached: np.ndarray

    def text(self) -> str:
        """One line for people: how many poses were reached, and the largest errors with their rows."""
        far, turned = int(np.argmax(self.position_error)), int(np.argmax(self.rotation_error))
        worst = f"at most {1e3 * self.position_error[far]:.3g} mm off (row {far})"
        worst = f"{worst} and {np.degrees(self.rotation_error[turned]):.3g} degrees (row {turned})"
        return f"{int(self.reached.sum())} of {len(self.reached)} poses reached, {worst}"


def follow(
    chain: Chain,
    base_from_ee: np.ndarray,
    start: np.ndarray | None = None,
    tolerance: Tolerance = Tolerance(),
    largest_step: np.ndarray | None = None,
) -> Followed:
    """Joint positions along a path.

    Args:
        chain: the arm.
        base_from_ee: (T, 4, 4) wanted, T >= 1.
        start: (n,) where the joints are before, or on their limits where they are beyond; of None, positions of the
            first pose are looked for, from the middle of the limits and then elsewhere in them.
        tolerance: what counts as reached.
        largest_step: (n,) by which each joint may move from one row to the next, radians or metres; by default half a
            radian, or a tenth of a metre.
    Raises:
        ValueError: the shapes are others, numbers are not finite, or a pose is no rigid transform.
    """
    wanted = np.asarray(base_from_ee, np.float64)
    if wanted.ndim != 3 or wanted.shape[1:] != (4, 4) or not len(wanted) or not np.isfinite(wanted).all():
        raise ValueError(f"poses are {wanted.shape}, finite or not; wanted (T, 4, 4), T >= 1, of finite numbers")
    turned_back = wanted[:, :3, :3] @ wanted[:, :3, :3].transpose(0, 2, 1)
    if (bent := np.abs(turned_back - np.eye(3)).max(axis=(1, 2))).max() > 1e-3 or np.linalg.det(wanted).min() < 0:
        raise ValueError(f"the pose of row {int(np.argmax(bent))} is no rigid transform: its rotation is no rotation")
    if largest_step is None:
        largest_step = np.where(chain.slides, LARGEST_SLIDE, LARGEST_TURN)
    if start is None:
        position = _found(chain, wanted[0], tolerance)
    else:
        position = np.array(start, np.float64)
        if position.shape != (len(chain),) or not np.isfinite(position).all():
            raise ValueError(f"start is {position.shape}, finite or not; wanted ({len(chain)},) of finite numbers")
        position = position.clip(chain.lower, chain.upper)
    best = None
    for pull in PULLS if len(chain) > 6 else ((0.0, 1),):
        positions = _along(chain, wanted, position, largest_step, pull)
        position_error, rotation_error = errors(chain.poses(positions), wanted)
        reached = (position_error <= tolerance.position) & (rotation_error <= tolerance.rotation)
        if best is None or reached.sum() > best.reached.sum():
            best = Followed(positions, position_error, rotation_error, reached)
        if reached.all():
            break
    return best


def _along(
    chain: Chain, wanted: np.ndarray, position: np.ndarray, largest_step: np.ndarray, pull: tuple[float, int]
) -> np.ndarray:
    """Positions (T, n), each from the one before, with the joints drawn to their middle by ``pull``."""
    middle, half = _middle(chain)
    before, (share, power) = position, pull
    positions = np.empty((len(wanted), len(chain)))
    for row, pose in enumerate(wanted):
        lower = np.maximum(chain.lower, position - largest_step)
        upper = np.minimum(chain.upper, position + largest_step)
        least = np.inf
        # Going on as it did leads straight through a singularity, where from standing still either branch is as near.
        for begin in ((2 * position - before).clip(lower, upper), position):
            drawn = share * half * ((middle - begin) / half) ** power
            found, badness = _towards(chain, pose, begin, lower, upper, drawn)
            if badness < least:
                positions[row], least = found, badness
            if least < GOOD:
                break
        before, position = position, positions[row]
    return positions


def errors(poses: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Metres (T,) and radians (T,) between poses (T, 4, 4)."""
    turned = wanted[:, :3, :3].transpose(0, 2, 1) @ poses[:, :3, :3]
    far = np.linalg.norm(poses[:, :3, 3] - wanted[:, :3, 3], axis=1)
    return far, Rotation.from_matrix(turned).magnitude()


def _middle(chain: Chain) -> tuple[np.ndarray, np.ndarray]:
    """(n,) of the limits, and half their distance; of a joint that has none 0, and half a turn."""
    limited = np.isfinite(chain.lower) & np.isfinite(chain.upper)
    lower, upper = np.where(limited, chain.lower, -np.pi), np.where(limited, chain.upper, np.pi)
    return (lower + upper) / 2, (upper - lower) / 2


def _found(chain: Chain, wanted: np.ndarray, tolerance: Tolerance) -> np.ndarray:
    """Positions (n,) at a pose (4, 4), or the nearest that were found: the first of some trials that reaches it."""
    (middle, half), none = _middle(chain), np.zeros(len(chain))
    trials = np.random.default_rng(0).uniform(-1, 1, (MOST_TRIALS - 1, len(chain)))
    trials = trials[np.argsort(np.linalg.norm(trials, axis=1))]  # the most comfortable ones first
    nearest, least = middle, np.inf
    for trial in (middle, *(middle + half * trials)):
        position, badness = _towards(chain, wanted, trial, chain.lower, chain.upper, none)
        far, turned = (float(error[0]) for error in errors(chain.poses(position[None]), wanted[None]))
        if far <= tolerance.position and turned <= tolerance.rotation:
            return position
        if badness < least:
            nearest, least = position, badness
    return nearest


def _towards(
    chain: Chain, wanted: np.ndarray, position: np.ndarray, lower: np.ndarray, upper: np.ndarray, pull: np.ndarray
) -> tuple[np.ndarray, float]:
    """Positions (n,) nearer to a pose (4, 4) than ``position``, as near as steps within the limits lead; what is left.

    ``pull`` (n,) is where the joints go as far as the pose leaves it open.
    """
    both, far, angle = _descended(chain, wanted, position, lower, upper, pull, True)
    if far > NEAR[0]:  # an orientation that cannot be met has kept it from the position
        both, far, angle = _descended(chain, wanted, both, lower, upper, np.zeros(len(both)), False)
    return both, POSITION_COUNTS * far + angle**2


def _descended(
    chain: Chain,
    wanted: np.ndarray,
    position: np.ndarray,
    lower: np.ndarray,
    upper: np.ndarray,
    pull: np.ndarray,
    with_rotation: bool,
) -> tuple[np.ndarray, float, float]:
    """The best of some steps: positions (n,), metres and radians that are left."""
    best, least, left, trust = position, np.inf, (np.inf, np.inf), 1.0  # of a step that made it worse, a part is tried
    step = np.zeros(len(position))
    for _ in range(MOST_STEPS):
        pose, jacobian = chain.pose_and_jacobian(position)
        off = wanted[:3, 3] - pose[:3, 3]
        turned = _rotation_vector(wanted[:3, :3] @ pose[:3, :3].T)
        far, angle = float(off @ off) ** 0.5, float(turned @ turned) ** 0.5
        badness = POSITION_COUNTS * far + with_rotation * angle**2
        if badness < least:
            best, least, left, trust = position, badness, (far, angle), min(1.0, 2 * trust)
            if far < NEAR[0] and (angle < NEAR[1] or not with_rotation):
                break
            step = _step(jacobian, off, turned, lower - position, upper - position, pull, with_rotation)
            pull = np.zeros(len(position))
        else:
            trust /= 4
        if np.abs(trust * step).max() < 1e-6:
            break
        position = best + trust * step
    return best, *left


def _step(
    jacobian: np.ndarray,
    off: np.ndarray,
    turned: np.ndarray,
    lowest: np.ndarray,
    highest: np.ndarray,
    pull: np.ndarray,
    with_rotation: bool,
) -> np.ndarray:
    """(n,) that takes away the errors ``off`` (3,), metres, and as far as that leaves it open ``turned`` (3,), radians.

    Within ``lowest`` and ``highest`` (n,), both sides of 0.
    """
    wanted, begin = np.concatenate([off, turned]), pull.clip(lowest, highest)
    step = begin + _way(jacobian, wanted - jacobian @ begin, with_rotation)
    if (step >= lowest).all() and (step <= highest).all():
        return step
    step = begin
    for both in (False, True)[: 1 + with_rotation]:  # what the position needs first, so that no turn uses up its joints
        free = np.ones(len(step), bool)
        while free.any():
            way = _way(jacobian * free, wanted - jacobian @ step, both)
            room = np.where(way > 0, highest - step, lowest - step)
            share = np.divide(room, way, out=np.full(len(step), np.inf), where=np.abs(way) > 1e-12)
            first = int(np.argmin(share))
            step = step + min(1.0, max(share[first], 0.0)) * way
            if share[first] >= 1:
                break
            free[first] = False
    return step.clip(lowest, highest)


def _way(jacobian: np.ndarray, left: np.ndarray, with_rotation: bool) -> np.ndarray:
    """(n,) that takes away what is ``left`` (6,): the position, and the rotation by what leaves the position alone."""
    to_move, to_turn = jacobian[:3], jacobian[3:]
    damped = to_move @ to_move.T
    damped[_DIAGONAL] += DAMPING + 0.1 * (left[:3] @ left[:3])
    inverse = np.linalg.solve(damped, np.concatenate([to_move, left[:3, None]], axis=1))  # (3, n + 1)
    way = to_move.T @ inverse[:, -1]
    if not with_rotation:
        return way
    to_turn_alone = to_turn - (to_turn @ to_move.T) @ inverse[:, :-1]
    damped = to_turn_alone @ to_turn_alone.T
    damped[_DIAGONAL] += DAMPING + 0.05 * min(left[3:] @ left[3:], 0.1)
    turn = to_turn_alone.T @ np.linalg.solve(damped, left[3:] - to_turn @ way)
    return way + turn * min(1.0, LARGEST_PART / np.abs(turn).max(initial=1e-12))


_DIAGONAL = np.diag_indices(3)


def _rotation_vector(rotation: np.ndarray) -> np.ndarray:
    """(3,) radians of a rotation (3, 3)."""
    vector = np.array(
        [rotation[2, 1] - rotation[1, 2], rotation[0, 2] - rotation[2, 0], rotation[1, 0] - rotation[0, 1]]
    )
    sine, cosine = float(vector @ vector) ** 0.5 / 2, float(np.trace(rotation) - 1) / 2
    if sine > 1e-6:
        return vector * (np.arctan2(sine, cosine) / (2 * sine))
    return (
        vector / 2 if cosine > 0 else Rotation.from_matrix(rotation).as_rotvec()
    )  # half a turn: any axis but SciPy's is
