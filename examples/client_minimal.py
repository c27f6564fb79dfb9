"""A robot's control loop around a policy that runs elsewhere: frames in, chunks out, poses at a fixed rate.

    python examples/client_minimal.py --frames frames.npz --prompt "put the can in the dark bin"

Needs numpy, Pyro4 and the folder ``shm_transport``, nothing else of this repository: copy both to the robot and replace
``RecordedRobot``, which plays a recording (made by ``examples/record_frames.py``) and moves nothing.
"""

import argparse
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where shm_transport lies, if it is not installed

from shm_transport import SessionLost, TransportError, get_shm_proxy


class RecordedRobot:
    """Your robot has these three methods; times are in the unit of the policy's clock."""

    def __init__(self, path):
        self.recording = dict(np.load(path, allow_pickle=False))
        self.cameras = sorted({key.split("/")[0] for key in self.recording if "/" in key})
        self.times = self.recording["timestamp"]
        self.now, self.executed = self.times[0], []

    def observe(self):
        """The newest frame: ``world_from_ee`` (Nee, 4, 4), openness (Nee,), and of each camera image, K and pose."""
        index = np.searchsorted(self.times, self.now, side="right") - 1
        frame = {name: self.recording[name][index] for name in ("ee_pose", "gripper")}
        for name in self.cameras:
            color, K, wcT = (self.recording[f"{name}/{part}"][index] for part in ("color", "K", "wcT"))
            size = {"height": color.shape[0], "width": color.shape[1]}
            frame[name] = {"model": "pinhole", "camera": {**size, "K": K}, "data": {"color": color, "wcT": wcT}}
        return {**frame, "timestamp": float(self.now)}

    def execute(self, world_from_ee, openness):
        """Move the end-effectors towards (Nee, 4, 4); openness (Nee,) is 0 closed, 1 open."""
        self.executed.append((self.now, world_from_ee, openness))

    def wait(self, seconds, units):
        """Until the next control step, which is ``units`` of the policy's clock later."""
        time.sleep(seconds)
        self.now += units


def control(policy, robot, prompt, steps, seconds, units, query_every):
    """The loop: a query every ``query_every`` steps in the background, a pose of the newest chunk at every step.

    Where no answer comes, as while the service is started anew, the arm goes to the chunk's end and stays there.
    """
    policy.reset()
    policy.set_prompt(prompt)
    chunk, query = None, None
    with ThreadPoolExecutor(1) as background:
        for step in range(steps):
            if query is None and step % query_every == 0:
                query = background.submit(ask, policy, robot.observe(), prompt)
            if query is not None and (chunk is None or query.done()):  # the first chunk is waited for
                answer, query = query, None
                try:
                    chunk = answer.result()
                    ms = {stage: round(1e3 * s, 1) for stage, s in policy.last_timing.items()}
                    print(f"step {step}: chunk for t = {chunk['times'][0]:.3f} to {chunk['times'][-1]:.3f}; ms: {ms}")
                except TransportError as error:
                    print(f"step {step}: no answer, the arm stays where the last chunk ends: {error}")
            if chunk is not None:
                robot.execute(*pose_at(chunk, robot.now + units))
            robot.wait(seconds, units)


def ask(policy, frame, prompt):
    """A chunk; where the session was lost (the service was restarted, or too slow), the next one is told the prompt."""
    try:
        return policy.run_inference(frame)
    except SessionLost as error:
        print(f"going on in a new session: {error}")
        return policy.run_inference(frame, prompt)


def pose_at(chunk, when):
    """Pose (Nee, 4, 4) and openness (Nee,) of a chunk's first sample at a time, between the two next to it."""
    times = chunk["times"]
    right = int(np.clip(np.searchsorted(times, when), 1, len(times) - 1))
    share = np.clip((when - times[right - 1]) / (times[right] - times[right - 1]), 0, 1)
    before, after = chunk["poses"][0][right - 1], chunk["poses"][0][right]
    pose = (1 - share) * before + share * after
    u, _, vt = np.linalg.svd(pose[:, :3, :3])  # back onto the rotations; neighbours are close
    pose[:, :3, :3] = u @ vt
    return pose, (1 - share) * chunk["grippers"][0][right - 1] + share * chunk["grippers"][0][right]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", required=True, help=".npz of recorded frames")
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--uri", default="apt_control", help="the service's name")
    parser.add_argument("--ns_host", default="localhost")
    parser.add_argument("--ns_port", type=int, default=9091)
    parser.add_argument("--rate", type=float, default=20.0, help="control steps per second")
    parser.add_argument("--units", type=float, default=1.0, help="of the policy's clock per control step")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--query_every", type=int, default=8, help="control steps between two queries")
    args = parser.parse_args()
    try:
        robot = RecordedRobot(args.frames)
        with get_shm_proxy(args.uri, ns_host=args.ns_host, ns_port=args.ns_port, timeout=30.0) as policy:
            control(policy, robot, args.prompt, args.steps, 1 / args.rate, args.units, args.query_every)
    except (TransportError, ValueError, OSError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped")
    print(f"{len(robot.executed)} control steps; last position {robot.executed[-1][1][0, :3, 3].round(3).tolist()}")


if __name__ == "__main__":
    main()
