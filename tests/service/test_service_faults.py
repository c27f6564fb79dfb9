"""What robots, services and name servers do when one of them dies, or sends rubbish: real processes, real signals."""

from __future__ import annotations

import os
import random
import socket
import threading

import numpy as np
import pytest

from shm_transport import SessionLost, TransportError, get_shm_proxy
from shm_transport.names import NameServer
from shm_transport.segments import PREFIX
from tests.infer.helpers import frame_at
from tests.service.helpers import PROMPT, connect, running_policy
from tests.transport.conftest import free_port, running, running_name_server, wait_until

LONG = {"sample_num": 8, "steps": 60}  # a query that still runs when something happens

CLIENT = """
import sys
import numpy as np
from shm_transport import get_shm_proxy

camera = {
    "camera": {"K": np.diag([96.0, 96.0, 1.0])},
    "data": {"color": np.zeros((96, 96, 3), np.uint8), "wcT": np.eye(4)},
}
frame = {"e2h_cam": camera, "eih_cam": camera, "ee_pose": np.eye(4), "gripper": 1.0, "timestamp": 0.0}
robot = get_shm_proxy("apt_control", ns_port=int(sys.argv[1]))
robot.run_inference(frame, "go", sample_num=8, steps=60)
"""


def segments() -> list[str]:
    return [name for name in os.listdir("/dev/shm") if name.startswith(PREFIX)]


def queries_running(robot) -> list[dict]:
    """Clients whose query is being answered."""
    return [client for client in robot.status()["clients"] if client["running"] in ("run_inference", "get_action")]


def started(query) -> threading.Thread:
    """A thread that runs ``query``; its outcome, or its error, is ``thread.outcome``."""

    def run() -> None:
        try:
            thread.outcome = query()
        except Exception as error:  # noqa: BLE001 - the test looks at it
            thread.outcome = error

    thread = threading.Thread(target=run)
    thread.start()
    return thread


def test_a_client_killed_in_a_query_leaves_the_others_served_and_nothing_behind(robot, ns_port, dataset):
    robot.run_inference(frame_at(dataset, 0, 0), PROMPT)
    with running("-c", CLIENT, str(ns_port)) as client:
        (victim,) = wait_until(lambda: queries_running(robot), 30)
        client.kill()
    assert robot.run_inference(frame_at(dataset, 0, 1))["poses"].shape == (1, 32, 1, 4, 4)
    wait_until(lambda: victim["id"] not in [client["id"] for client in robot.status()["clients"]], 15)
    wait_until(lambda: not segments(), 5)


def test_rubbish_on_the_port_does_not_disturb_the_service(service, robot, ns_port, dataset):
    location = NameServer("localhost", ns_port).lookup("apt_control")
    robot.set_prompt(PROMPT)
    rng = random.Random(0)
    for length in (0, 1, 24, 500, 4096):
        for start in (b"", b"PYRO", b"GET / HTTP/1.1\r\n", b"\x80\x04cos\nsystem\n"):
            with socket.create_connection((location.host, location.port), timeout=5) as peer:
                peer.sendall(start + rng.randbytes(length))
    assert robot.run_inference(frame_at(dataset, 0, 0))["poses"].shape == (1, 32, 1, 4, 4)
    assert service.popen.poll() is None


@pytest.mark.parametrize(
    "arguments, kind",
    [
        (("x" * 100,), ValueError),
        (([{"a": 1}],), ValueError),
        ((None, 3), ValueError),
        ((None, None, 0), ValueError),
        ((None, None, 1, False, False, 10**6), ValueError),
        ((None, None, 1, False, False, None, "euler"), ValueError),
    ],
)
def test_nonsense_in_a_query_is_the_clients_error_and_its_session_goes_on(robot, local, dataset, arguments, kind):
    for planner in (robot, local):
        planner.run_inference(frame_at(dataset, 0, 0), PROMPT)
    with pytest.raises(kind):
        robot.run_inference(*arguments)
    for one, other in zip(robot.get_action()[:3], local.get_action()[:3], strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_service_that_is_told_to_stop_answers_what_runs_and_leaves_nothing(checkpoint, ns_port, dataset):
    with running_policy(checkpoint, ns_port, uri="stopping") as service:
        with connect(ns_port, "stopping") as robot, connect(ns_port, "stopping") as other:
            robot.run_inference(frame_at(dataset, 0, 0), PROMPT)
            query = started(lambda: robot.get_action(**LONG))
            wait_until(lambda: queries_running(other), 20)
            said = service.terminate()
            query.join(30)
            assert query.outcome[0].shape == (8, 32, 1, 4, 4)
            with pytest.raises(TransportError):
                robot.get_action()
        assert service.popen.returncode == 0 and "ended: " in said
    assert NameServer("localhost", ns_port).find("stopping") is None
    assert not segments()


def test_a_service_killed_in_a_query_is_a_prompt_named_error_and_leaves_nothing(checkpoint, ns_port, dataset):
    with running_policy(checkpoint, ns_port, uri="mortal") as service:
        robot, other = connect(ns_port, "mortal"), connect(ns_port, "mortal")
        robot.run_inference(frame_at(dataset, 0, 0), PROMPT)
        query = started(lambda: robot.get_action(**LONG))
        wait_until(lambda: queries_running(other), 20)
        service.kill()
        query.join(5)
        assert isinstance(query.outcome, SessionLost) and "mortal.get_action" in str(query.outcome)
        with pytest.raises(TransportError):
            other.ping()
        wait_until(lambda: not segments(), 5)


@pytest.mark.slow
def test_a_service_that_comes_back_begins_a_new_session(checkpoint, ns_port, dataset):
    with running_policy(checkpoint, ns_port, uri="mortal") as service:
        robot = connect(ns_port, "mortal")
        robot.run_inference(frame_at(dataset, 0, 0), PROMPT)
        service.kill()
        with pytest.raises(SessionLost):
            robot.get_action()
    with running_policy(checkpoint, ns_port, uri="mortal"), robot:
        with pytest.raises(ValueError, match="prompt"):  # what the old service knew is gone
            robot.run_inference(frame_at(dataset, 0, 1))
        assert robot.run_inference(frame_at(dataset, 0, 1), PROMPT)["times"][0] == 2.0


@pytest.mark.slow
def test_a_name_server_may_be_restarted(checkpoint, dataset):
    port = free_port()
    with running_name_server(port) as name_server, running_policy(checkpoint, port, uri="lasting"):
        with connect(port, "lasting") as robot:
            robot.run_inference(frame_at(dataset, 0, 0), PROMPT)
            name_server.kill()
            robot.run_inference(frame_at(dataset, 0, 1))
            with pytest.raises(TransportError, match=f"pyro4-ns -p {port}"):
                connect(port, "lasting")
            with running_name_server(port):
                wait_until(lambda: NameServer("localhost", port).find("lasting"), 15)
                with connect(port, "lasting") as newcomer:
                    assert newcomer.ping()["ready"]
                assert robot.run_inference(frame_at(dataset, 0, 2))["times"][0] == 3.0


@pytest.mark.slow
def test_a_suspended_service_is_a_timeout_and_other_services_are_unharmed(service, ns_port, dataset):
    with connect(ns_port) as robot, get_shm_proxy("apt_control", ns_port=ns_port, timeout=1.0) as hasty:
        robot.run_inference(frame_at(dataset, 0, 0), PROMPT)
        service.suspend()
        try:
            with pytest.raises(TimeoutError, match="no reply .* within 1 s"):
                hasty.ping()
        finally:
            service.resume()
        assert hasty.ping()["ready"]
        assert robot.run_inference(frame_at(dataset, 0, 1))["times"][0] == 2.0
