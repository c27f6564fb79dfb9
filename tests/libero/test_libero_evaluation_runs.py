"""Whole evaluations in the simulator: interrupted, killed, over several processes, and through the policy service."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import av
import numpy as np
import pytest

from apt.checkpoint import checkpoint_sha256, write_config
from examples.libero.environment import ROOT, VENV
from tests.infer.helpers import tiny_policy
from tests.service.helpers import running_policy
from tests.transport.conftest import ns_port  # noqa: F401 (a fixture)
from train_utils.saving import save_checkpoint

pytestmark = [
    pytest.mark.sim,
    pytest.mark.slow,
    pytest.mark.skipif(
        not any(VENV.glob("lib/python3*/site-packages/libero/libero/assets/scenes")),
        reason="LIBERO or its assets are not there; run: bash examples/libero/setup.sh",
    ),
]


def start(folder: Path, *flags: object) -> subprocess.Popen:
    command = ["bash", "examples/libero/test_libero.sh", "--suites", "libero_object", "--save_root", folder]
    command += ["--video_root", folder / "videos", *flags]
    return subprocess.Popen(
        [str(part) for part in command],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def evaluate(folder: Path, *flags: object, code: int = 0) -> str:
    process = start(folder, *flags)
    said = process.communicate()[0]
    assert process.returncode == code, said
    return said


def episodes(json_file: Path) -> list[dict]:
    """What is known of each episode, less what it took."""
    return [
        {name: value for name, value in episode.items() if name != "seconds"}
        for episode in json.loads(json_file.read_text())["episodes"]
    ]


def simulators(pid: int) -> list[int]:
    """The evaluator's simulator processes."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in children if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]


def wait_for(condition, process: subprocess.Popen, seconds: float = 240.0):
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.05)
    return value


def test_a_run_that_was_killed_and_interrupted_ends_with_the_same_file(tmp_path):
    flags = ("--policy", "expert", "--num_trials_per_task", 2, "--begin_task_id", 8, "--no-video", "--max_steps", 280)
    evaluate(tmp_path / "whole", *flags)
    whole = tmp_path / "whole/libero_object/expert.csv"
    assert len(whole.read_text().splitlines()) == 6 and "mean,4,1.000000," in whole.read_text()

    parts = tmp_path / "parts/libero_object/expert.csv"
    process = start(tmp_path / "parts", *flags, "--num_workers", 2)
    wait_for(parts.exists, process)
    os.kill(simulators(process.pid)[0], signal.SIGKILL)
    wait_for(lambda: len(simulators(process.pid)) == 2, process)  # another has taken its place
    os.killpg(process.pid, signal.SIGINT)
    said = process.communicate(timeout=30)[0]
    assert process.returncode == 130 and "interrupted; the same command goes on" in said, said
    begun = len(parts.read_text().splitlines()) - 2
    assert 1 <= begun < 4
    parts.write_text(parts.read_text()[:-9])  # and the last line was cut short

    evaluate(tmp_path / "parts", *flags, "--num_workers", 2)
    assert parts.read_bytes() == whole.read_bytes()
    assert episodes(parts.with_suffix(".json")) == episodes(whole.with_suffix(".json"))

    said = evaluate(tmp_path / "parts", *flags[:-1], 281, code=2)
    assert re.fullmatch(r"error: .*begun with other settings \(max_steps: 280 -> 281\).*--no-conti\n", said)


def test_parts_on_three_machines_one_of_them_killed_come_to_the_whole(tmp_path):
    flags = ("--policy", "random", "--num_trials_per_task", 3, "--task_ids", "0-1", "--no-video", "--max_steps", 60)
    evaluate(tmp_path / "whole", *flags)
    parts = tmp_path / "parts"
    machines = [start(parts, *flags, "--shard", f"{number}/3") for number in range(3)]
    killed = machines.pop()
    wait_for((parts / "libero_object/random.2_of_3.csv").exists, killed)
    os.killpg(killed.pid, signal.SIGKILL)
    for machine in (*machines, start(parts, *flags, "--shard", "2/3")):
        said = machine.communicate()[0]
        assert machine.returncode == 0 and "libero_object: 0/2" in said, said
    assert "libero_object: 0/6" in evaluate(parts, *flags)
    whole, merged = (root / "libero_object/random.csv" for root in (tmp_path / "whole", parts))
    assert merged.read_bytes() == whole.read_bytes()
    assert episodes(merged.with_suffix(".json")) == episodes(whole.with_suffix(".json"))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A tiny policy for LIBERO's cameras, as a run would leave it."""
    folder, policy = tmp_path_factory.mktemp("libero_policy"), tiny_policy()
    config = dataclasses.replace(policy.train_config, dataset_classes=("LiberoObject",))
    save_checkpoint({"weights": policy.model.released_weights(), "current_iters": 1}, folder / "ckpt_latest.pt")
    write_config(folder, json.loads(json.dumps(config.to_dict())))
    return folder / "ckpt_latest.pt"


def test_processes_share_a_service_and_give_what_one_alone_gives(checkpoint, tmp_path, ns_port):  # noqa: F811
    flags = ["--model_name", "tiny", "--controller_port", ns_port, "--no-all", "--num_trials_per_task", 2]
    flags += ["--max_steps", 8, "--image_size", 64]
    with running_policy(checkpoint, ns_port, uri="control"):
        evaluate(tmp_path / "one", *flags)
        evaluate(tmp_path / "two", *flags, "--num_workers", 2, "--no-video")
    one, two = (tmp_path / name / "libero_object/tiny.json" for name in ("one", "two"))
    assert episodes(one) == episodes(two)
    first, second = episodes(one)
    assert first["queries"] == 3 and first["ee_end"] != second["ee_end"]
    policy = json.loads(one.read_text())["settings"]["policy"]
    assert policy["checkpoint"]["sha256"] == checkpoint_sha256(checkpoint)
    assert policy["sampling"]["steps"] == 2 and policy["config"]["cameras"] == ["agentview", "eye_in_hand"]

    with av.open(str(tmp_path / "one/videos/libero_object/tiny/task000/ep001.mp4")) as video:
        frames = [frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)]
    assert len(frames) == 3 + 7  # at queries, and the outcome for a second
    drawn = np.abs(frames[0].astype(int) - (255, 64, 32)).sum(axis=2) < 90
    assert drawn[:, : drawn.shape[1] // 2].any()  # the path, on the fixed camera

    said = evaluate(tmp_path / "one", *flags, code=2)
    assert "error:" in said and "control" in said  # the service is gone: said before anything is run
