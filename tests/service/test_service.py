"""The remote service against a planner in this process: real processes, a real name server."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
import threading
from time import sleep
from types import SimpleNamespace

import numpy as np
import pytest

from apt.infer.planner import TrajPlanner
from apt.infer.remote_service import main as remote_service
from data_utils.datasets import AlohaPickPlace
from examples import client_minimal
from examples.record_frames import main as record_frames
from shm_transport import RemoteError, SessionLost, TransportError, connection_info
from shm_transport.names import NameServer
from tests.infer.helpers import frame_at
from tests.service.helpers import PROMPT, STEPS, connect
from tests.transport.conftest import ROOT


def agree(remote, local, atol: float = 0.0) -> None:
    """Poses, grippers, times and drawing of two answers are the same; to rounding where a pass may have been shared."""
    for one, other in zip(remote[:3], local[:3], strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_allclose(one, other, rtol=0, atol=atol)
    assert (remote[3] is None) == (local[3] is None)


def test_a_client_plans_as_if_the_planner_were_its_own(robot, local, dataset):
    assert connection_info(robot)["shared_memory"]
    assert robot.get_action() is None
    for planner in (robot, local):
        planner.set_prompt(PROMPT)
    for time in (3, 5, 9):  # the ensemble blends
        for planner in (robot, local):
            planner.add_obs_frame(frame_at(dataset, 0, time))
        agree(robot.get_action(2, True), local.get_action(2, True))
    for planner in (robot, local):
        planner.reset()
        planner.set_ensemble_nums(0)
        planner.add_obs_frame(frame_at(dataset, 1, 0))
    agree(robot.get_action(steps=3, sampler="dpm"), local.get_action(steps=3, sampler="dpm"))
    picture = robot.get_action(draw_traj=True, compress_traj_img=True)[3]
    assert isinstance(picture, bytes) and picture[:2] == b"\xff\xd8"


def test_a_trajectory_of_the_clients_own_is_blended_in(robot, local):
    poses, grippers, times = np.tile(np.eye(4), (4, 1, 1, 1)), np.ones((4, 1)), np.arange(4.0)
    for shift in (0.0, 0.1):
        poses[:, 0, 0, 3] = shift
        for one, other in zip(
            robot.ensemble_traj(poses, grippers, times), local.ensemble_traj(poses, grippers, times), strict=True
        ):
            np.testing.assert_array_equal(one, other)
    assert 0 < one[0, 0] <= 1


def test_one_round_trip_takes_frames_and_instruction_and_gives_a_chunk_with_its_timing(robot, local, dataset):
    chunk = robot.run_inference(frame_at(dataset, 0, 3), PROMPT)
    plan = local.run_inference(frame_at(dataset, 0, 3), PROMPT)
    agree(
        [chunk[key] for key in ("poses", "grippers", "times", "image")], [plan.poses, plan.grippers, plan.times, None]
    )
    stages = ("wait", "preprocess", "vlm", "prefix", "denoise")
    assert set(chunk["timing"]) == {*stages, "total"} and all(seconds >= 0 for seconds in chunk["timing"].values())
    assert set(robot.last_timing) == {*stages, "total", "transport"}
    assert robot.last_timing["total"] >= sum(chunk["timing"][stage] for stage in stages)
    assert 0 < robot.last_timing["transport"] < 1
    later = [frame_at(dataset, 0, time) for time in (4, 5)]
    np.testing.assert_array_equal(robot.run_inference(later)["poses"], local.run_inference(later).poses)


def test_what_a_client_reads_of_the_service_is_plain_data(robot, checkpoint):
    identity, contract, config = robot.ping(), robot.observation_contract(), robot.get_config()
    assert identity["ready"] and identity["checkpoint"]["name"] == "tiny/ckpt_latest.pt"
    assert identity["device"] == "cpu" and identity["uptime_s"] > 0
    assert [camera["name"] for camera in contract["cameras"]] == ["e2h_cam", "eih_cam"]
    assert config["image_hw"] == (64, 64) and config["sample_dt"] == 1.0
    json.dumps([identity, contract, config, robot.status()])


def test_another_robots_config_brings_its_own_contract(robot, local, dataset):
    robot.set_config(AlohaPickPlace.config.to_dict())
    contract = robot.observation_contract()
    assert contract["clock"] == {"unit": "seconds", "time_step": 0.1}
    with pytest.raises(ValueError, match="'head_cam' is missing(.|\\n)*'e2h_cam' is not one"):
        robot.add_obs_frame(frame_at(dataset, 0, 0))
    robot.set_config(
        AlohaPickPlace.config.to_dict()
        | {
            "cameras": ["e2h_cam", "eih_cam"],
            "wrist_cameras": [],
            "ee_ref_cams": [],
            "record_dt": None,
            "sample_dt": 1.0,
        }
    )
    robot.add_obs_frame(frame_at(dataset, 0, 0))
    with pytest.raises(ValueError, match="unknown DataConfig field"):
        robot.set_config({"cams": ["e2h_cam"]})
    with pytest.raises(ValueError, match="unknown dataset class"):
        robot.set_config("NoSuchRobot")
    with pytest.raises(ValueError, match="not trained on AlohaPickPlace; it was on PickPlaceCan"):
        robot.set_config("AlohaPickPlace")
    robot.set_config("PickPlaceCan")
    assert robot.get_config()["image_hw"] == (64, 64), "the size of training"


def test_a_client_that_does_not_meet_the_contract_is_told_everything_at_once(robot, dataset):
    frame = frame_at(dataset, 0, 0)
    frame["front_cam"] = frame.pop("eih_cam")
    frame.update(ee_pose=np.tile(np.eye(4), (2, 1, 1)), gripper=np.ones(2))
    with pytest.raises(ValueError) as caught:
        robot.run_inference(frame)
    for named in ("'eih_cam' is missing", "'front_cam' is not one", "ee_pose", "prompt"):
        assert named in str(caught.value), named
    assert isinstance(caught.value, RemoteError) and caught.value.remote_type.endswith("ContractError")
    robot.set_prompt(PROMPT)
    robot.add_obs_frame(frame_at(dataset, 0, 0))
    with pytest.raises(ValueError, match="0.05 apart; the policy's clock counts control steps"):
        robot.add_obs_frame(frame_at(dataset, 0, 0) | {"timestamp": 0.05})


def test_a_delay_that_leaves_nothing_of_a_chunk_to_plan_is_refused(robot):
    robot.set_ensemble_nums(0)
    for delay, named in ((-1.0, "delay is -1.0"), ("x", "delay is 'x'"), (40, "40 control steps, and a chunk is 32")):
        with pytest.raises(ValueError, match=named):
            robot.set_chunking(delay)
    robot.set_chunking(4)


BAD = {
    "eih_cam": lambda f: f.pop("eih_cam"),
    "e2h_cam.data.wcT": lambda f: f["e2h_cam"]["data"].pop("wcT"),
    "e2h_cam.data.color": lambda f: f["e2h_cam"]["data"].update(color=np.zeros((96, 96, 3), np.float32)),
    "eih_cam.data.color": lambda f: (
        f["eih_cam"]["data"].update(color=np.zeros((48, 48, 3), np.uint8)),
        f["eih_cam"]["camera"].update(height=48, width=48),
    ),
    "ee_pose": lambda f: f["ee_pose"].__setitem__((0, 0, 3), np.nan),
    "gripper": lambda f: f.update(gripper=np.array([1.5])),
    "timestamp": lambda f: f.update(timestamp=3.0),
}


@pytest.mark.parametrize("key", BAD)
def test_a_bad_frame_is_refused_as_locally_and_changes_nothing(robot, local, dataset, key):
    for planner in (robot, local):
        planner.run_inference([frame_at(dataset, 0, time) for time in (3, 4)], PROMPT)
    bad = copy.deepcopy(frame_at(dataset, 0, 6))
    BAD[key](bad)
    said = []
    for planner in (robot, local):
        with pytest.raises(ValueError) as caught:
            planner.run_inference([frame_at(dataset, 0, 5), bad], "another instruction")
        with pytest.raises(ValueError):
            planner.add_obs_frame(bad)
        said.append(str(caught.value))
    assert said[0] == said[1] and key in said[0]
    agree(robot.get_action(), local.get_action())


def test_eight_clients_interleaved_do_not_see_one_anothers_frames_prompts_or_noise(service, ns_port, policy, dataset):
    prompts = [f"reach for the {colour} square, take {number}" for number in range(4) for colour in ("red", "blue")]
    failures = []

    def plans(planner, number: int) -> list:
        answers = []
        for time in range(3):
            planner.add_obs_frame(frame_at(dataset, number % 6, time + number))
            planner.set_prompt(prompts[(number + time) % 8])
            answers.append(planner.get_action())
        return answers

    def client(number: int) -> None:
        try:
            with connect(ns_port) as robot:
                remote[number] = plans(robot, number)
        except Exception as error:  # noqa: BLE001 - whatever it is, the test shows it
            failures.append(error)

    remote: dict[int, list] = {}
    threads = [threading.Thread(target=client, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failures and len(remote) == 8
    for number in range(8):
        for one, other in zip(remote[number], plans(TrajPlanner.of_policy(policy, steps=STEPS), number), strict=True):
            agree(one, other, atol=1e-5)


def test_the_client_example_sets_the_prompt_again_where_its_session_was_lost():
    told = []

    def run_inference(frame, prompt=None):
        told.append(prompt)
        if prompt is None:
            raise SessionLost("the service was restarted")
        return "chunk"

    assert client_minimal.ask(SimpleNamespace(run_inference=run_inference), {}, PROMPT) == "chunk"
    assert told == [None, PROMPT]


def test_the_client_example_stays_at_its_chunks_end_while_the_service_is_away_and_goes_on_when_it_is_back(capsys):
    asked = []

    def run_inference(frame, prompt=None):
        asked.append(prompt)
        if 2 <= len(asked) <= 3:
            raise TransportError("no service there")
        if len(asked) == 4:
            raise SessionLost("the service was restarted")
        poses = np.tile(np.eye(4), (1, 3, 1, 1, 1))
        poses[0, :, 0, 0, 3] = len(asked) + np.arange(3)
        return {"poses": poses, "grippers": np.ones((1, 3, 1)), "times": frame["timestamp"] + np.arange(1.0, 4.0)}

    class Robot:
        now, executed = 0.0, []

        def observe(self):
            return {"timestamp": self.now}

        def execute(self, world_from_ee, openness):
            self.executed.append(float(world_from_ee[0, 0, 3]))

        def wait(self, seconds, units):
            sleep(seconds)
            self.now += units

    policy = SimpleNamespace(
        run_inference=run_inference, reset=lambda: None, set_prompt=lambda prompt: None, last_timing={}
    )
    client_minimal.control(policy, Robot(), PROMPT, steps=40, seconds=0.02, units=1.0, query_every=10)
    assert asked == [None, None, None, None, PROMPT]
    assert Robot.executed[:3] == [1.0, 2.0, 3.0] and set(Robot.executed[3:30]) == {3.0} and Robot.executed[-1] == 7.0
    said = capsys.readouterr().out
    assert said.count("no answer, the arm stays where the last chunk ends: no service there") == 2


def test_the_client_example_says_in_one_line_that_there_are_no_frames(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["client_minimal", "--frames", str(tmp_path / "no.npz"), "--prompt", PROMPT])
    with pytest.raises(SystemExit, match="FileNotFoundError: .*no.npz") as ended:
        client_minimal.main()
    assert "\n" not in ended.value.code


@pytest.mark.parametrize(
    "out, flags, named",
    [
        ("frames.npz", ["--dataset-class", "PickPlaceCann"], "unknown dataset class 'PickPlaceCann'"),
        ("frames.npz", ["--dataset-class", "AlohaPickPlace"], "head_cam.*camera is missing; the file has"),
        ("no/frames.npz", ["--dataset-class", "PickPlaceCan"], "there is no folder .*no for frames.npz"),
        ("frames.npz", ["--dataset-class", "PickPlaceCan", "--frames", "0"], "--frames is 0"),
    ],
)
def test_frames_that_cannot_be_recorded_are_one_line(episode_dir, tmp_path, monkeypatch, capsys, out, flags, named):
    monkeypatch.setattr("examples.record_frames.frame_from_episode", lambda *_: pytest.fail("a frame was read"))
    assert record_frames([str(episode_dir / "ep000.h5"), str(tmp_path / out), *flags]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and re.search(f"error: .*{named}", said), said


def test_the_client_example_moves_a_robot_without_this_library(service, ns_port, tmp_path, episode_dir):
    """In a process that cannot import torch, nor anything else of the project but ``shm_transport``."""
    assert (
        record_frames([str(episode_dir / "ep000.h5"), str(tmp_path / "frames.npz"), "--dataset-class", "PickPlaceCan"])
        == 0
    )
    program = (
        "import runpy, sys\n"
        "for name in ('torch', 'cv2', 'h5py', 'scipy', 'msgpack', 'apt', 'data_utils', 'infer_utils'):\n"
        "    sys.modules[name] = None\n"
        "runpy.run_path('examples/client_minimal.py', run_name='__main__')\n"
    )
    arguments = ["--frames", str(tmp_path / "frames.npz"), "--prompt", PROMPT, "--ns_port", str(ns_port)]
    command = [sys.executable, "-c", program, *arguments, "--steps", "20", "--rate", "50", "--query_every", "5"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "20 control steps; last position" in done.stdout and "'transport'" in done.stdout


def test_the_status_says_who_asks_what_and_how_long_it_takes(robot, ns_port, dataset, capsys):
    robot.run_inference(frame_at(dataset, 0, 3), PROMPT)
    status = robot.status()
    assert status["queries"]["answered"] >= 1 and status["queries"]["per_second"] > 0
    assert set(status["queries"]["latency_s"]["total"]) == {"p50", "p90", "p99"}
    (mine,) = [client for client in status["clients"] if client["answered"] == 1 and client["last_s_ago"] < 5]
    assert mine["host"].startswith("127.0.0.1:") and mine["shared_memory"]

    assert remote_service(["--status", "--ns_port", str(ns_port)]) == 0
    told = capsys.readouterr().out
    for part in ("apt_control: up", "tiny/ckpt_latest.pt", "e2h_cam", "p99", "denoise", mine["host"]):
        assert part in told, part


def test_the_status_of_a_service_that_is_not_there_says_what_to_do(ns_port, capsys):
    assert remote_service(["--status", "--uri", "nobody", "--ns_port", str(ns_port)]) == 2
    assert "knows no 'nobody'; start the service" in capsys.readouterr().err
    assert remote_service(["--status", "--ns_port", "1"]) == 2
    assert "pyro4-ns -p 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, said",
    [
        ([], "--ckpt is missing"),
        (["--ckpt", "/nowhere/ckpt.pt"], "there is no /nowhere/ckpt.pt"),
        (["--ckpt", "RUN"], "is a run's folder; name .*ckpt_latest.pt"),
        (["--ckpt", "CKPT", "--port", "TAKEN"], r"cannot listen at localhost:\d+ .*--port wants a free one"),
        (["--ckpt", "CKPT", "--host", "192.0.2.1"], "cannot listen at 192.0.2.1:0 .*--host a name or address of this"),
        (["--ckpt", "CKPT", "--port", "70000"], "--port is 70000"),
        (["--ckpt", "CKPT", "--ensemble", "-1"], "--ensemble is -1"),
        (["--ckpt", "CKPT", "--sampler", "euler"], "euler"),
        (["--ckpt", "CKPT", "--steps", "0"], "steps"),
        (["--ckpt", "CKPT", "--compile", "much"], "much"),
        (["--ckpt", "CKPT", "--device", "cuda:99"], "cuda:99"),
        (["--ckpt", "CKPT", "--ns_port", "1"], "no name server at localhost:1"),
        (["--ckpt", "CKPT", "--uri", "apt_control"], "is a running service"),
        (["--ckpt", "CKPT", "--colour", "red"], "unknown flag --colour"),
    ],
)
def test_what_is_wrong_with_the_command_is_said_in_one_line_before_the_model_is_loaded(
    service, checkpoint, ns_port, capsys, arguments, said
):
    taken = NameServer("localhost", ns_port).lookup("apt_control").port
    values = {"CKPT": str(checkpoint), "RUN": str(checkpoint.parent), "TAKEN": str(taken)}
    arguments = [values.get(argument, argument) for argument in arguments]
    if "--ns_port" not in arguments:
        arguments += ["--ns_port", str(ns_port)]
    if "--uri" not in arguments:
        arguments += ["--uri", "another"]
    assert remote_service(arguments) == 2
    told = capsys.readouterr()
    assert told.err.startswith("error: ") and told.err.count("\n") == 1 and re.search(said, told.err)
    assert "loading" not in told.out
