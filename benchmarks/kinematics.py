"""How fast are joints turned into poses and back, beside MuJoCo and mink called row by row?

    python benchmarks/kinematics.py [--rows N] [--steps N] [--repeats N]

Arms of six and seven joints with the proportions of a UR5e and a Panda. Joints to poses: a column of rows at once,
beside ``mj_kinematics`` for each row. Poses to joints: a smooth path, followed from its first recorded row, beside
mink's differential inverse kinematics for each row until the pose is within a tenth of a millimetre and a hundredth of
a degree (twenty iterations at most). Process time of one thread; medians, and ratios over the library in the same run.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # one core is what is claimed

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs as a file, as it is called

from benchmarks.report import machine
from data_utils.kinematics.chain import Chain
from data_utils.kinematics.description import read_chain
from data_utils.kinematics.inverse import errors, follow
from tests.kinematics.arms import names, smooth, write_arm

POSITION, ROTATION, MOST = 1e-4, float(np.radians(0.01)), 20


def seconds(work: Callable[[], object], repeats: int) -> tuple[float, object]:
    """Median process time, and what came of the work."""
    taken = []
    for _ in range(repeats):
        began = time.process_time()
        result = work()
        taken.append(time.process_time() - began)
    return statistics.median(taken), result


def mujoco_poses(path: Path, positions: np.ndarray) -> np.ndarray:
    """(T, 4, 4) of the site, a row at a time."""
    import mujoco

    model = _model(path)
    data, site = mujoco.MjData(model), model.site("tip").id
    poses = np.tile(np.eye(4), (len(positions), 1, 1))
    for row, position in enumerate(positions):
        data.qpos[:] = position
        mujoco.mj_kinematics(model, data)
        poses[row, :3, :3], poses[row, :3, 3] = data.site_xmat[site].reshape(3, 3), data.site_xpos[site]
    return poses


def mink_positions(path: Path, poses: np.ndarray, start: np.ndarray) -> np.ndarray:
    """(T, n) that mink reaches, each row from the one before."""
    import mink

    configuration = mink.Configuration(_model(path), start)
    task = mink.FrameTask("tip", "site", position_cost=1.0, orientation_cost=1.0, lm_damping=1e-6)
    limits = [mink.ConfigurationLimit(configuration.model)]
    found = np.empty((len(poses), len(start)))
    for row, pose in enumerate(poses):
        task.set_target(mink.SE3.from_matrix(pose))
        for _ in range(MOST):
            error = task.compute_error(configuration)
            if np.linalg.norm(error[:3]) < POSITION and np.linalg.norm(error[3:]) < ROTATION:
                break
            velocity = mink.solve_ik(configuration, [task], 1.0, "daqp", limits=limits)
            configuration.integrate_inplace(velocity, 1.0)
        found[row] = configuration.q
    return found


def _model(path: Path):
    import mujoco

    description = mujoco.MjSpec.from_file(str(path))
    description.compiler.boundmass = description.compiler.boundinertia = 1.0
    return description.compile()


def report(what: str, rows: int, ours: float, theirs: float, library: str, accuracy: str) -> None:
    print(
        f"| {what} | {rows / ours:,.0f} | {rows / theirs:,.0f} ({library}) | {theirs / ours:.1f}x | {accuracy} |",
        flush=True,
    )


def measure(path: Path, chain: Chain, args: argparse.Namespace) -> None:
    count = len(chain)
    positions = np.random.default_rng(0).uniform(chain.lower, chain.upper, (args.rows, count))
    ours, poses = seconds(lambda: chain.poses(positions), args.repeats)
    theirs, wanted = seconds(lambda: mujoco_poses(path, positions), args.repeats)
    apart = f"{np.abs(poses - wanted).max():.0e} apart at most"
    report(f"joints to poses, {count} joints", args.rows, ours, theirs, "MuJoCo", apart)
    recorded = smooth(chain.lower, chain.upper, args.steps, 2, 0.3)
    path_poses = chain.poses(recorded)
    ours, found = seconds(lambda: follow(chain, path_poses, recorded[0]), args.repeats)
    theirs, minks = seconds(lambda: mink_positions(path, path_poses, recorded[0]), args.repeats)
    far, turned = errors(chain.poses(minks), path_poses)
    accuracy = (
        f"{1e3 * found.position_error.max():.2g} mm, {np.degrees(found.rotation_error.max()):.2g} degrees off at most"
    )
    accuracy = f"{accuracy} (mink {1e3 * far.max():.2g}, {np.degrees(turned.max()):.2g})"
    report(f"poses to joints, {count} joints", args.steps, ours, theirs, "mink", accuracy)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=50_000, help="of the column (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=300, help="of the path (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    print(f"{machine(torch.device('cpu'))}\n\n| | rows/s | row by row | ratio | |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for count in (6, 7):
            path = write_arm(Path(folder) / f"arm{count}.xml", count)
            measure(path, read_chain(path, names(count), "tip"), args)


if __name__ == "__main__":
    main()
