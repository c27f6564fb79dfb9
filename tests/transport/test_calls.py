"""Calls between two processes, found through a real name server."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch

from shm_transport import RemoteError, TransportError, UnknownName, connection_info, dive_into, expose, get_shm_proxy
from shm_transport.segments import PREFIX
from tests.transport.service import Pinhole


def observation(height: int = 256, width: int = 256, cameras: int = 2) -> dict:
    rng = np.random.default_rng(0)
    frame = {
        f"cam{index}": {
            "model": "pinhole",
            "camera": {"width": width, "height": height, "K": np.eye(3)},
            "data": {
                "color": rng.integers(0, 255, (height, width, 3), dtype=np.uint8),
                "wcT": np.eye(4, dtype=np.float32),
                "seg": None,
            },
        }
        for index in range(cameras)
    }
    return {**frame, "ee_pose": rng.normal(size=(1, 4, 4)), "gripper": np.ones(1), "timestamp": 0.125}


def test_an_observation_reaches_the_service_and_comes_back_unchanged(robot):
    sent = observation()
    assert connection_info(robot)["shared_memory"]
    got = robot.echo(sent)
    np.testing.assert_equal(got, sent)
    assert got["cam0"]["data"]["wcT"].dtype == np.float32
    got["cam0"]["data"]["color"][:] = 0  # the caller's own


def test_large_arrays_go_by_shared_memory_and_small_ones_inline(robot):
    robot.echo(np.zeros(8191, np.uint8))
    assert connection_info(robot)["segments_created"] == 0
    robot.echo(np.zeros(8192, np.uint8))
    assert connection_info(robot)["segments_created"] == 1


def test_no_memory_is_allocated_in_steady_state(robot):
    frame = observation()
    for _ in range(3):
        robot.echo(frame)
    mine = connection_info(robot)["segments_created"]
    its = robot.clients()[-1]["segments_created"]
    for _ in range(100):
        robot.echo(frame)
    assert connection_info(robot)["segments_created"] == mine
    assert robot.clients()[-1]["segments_created"] == its
    assert not [name for name in os.listdir("/dev/shm") if name.startswith(PREFIX)], "names are gone once both have it"


def test_a_segment_grows_geometrically(robot):
    for megabytes in range(1, 33):
        array = np.full(megabytes << 20, megabytes, np.uint8)
        assert robot.describe(array)["sum"] == megabytes * array.size
    assert connection_info(robot)["segments_created"] <= 6


def test_the_service_sees_read_only_views_without_a_copy(robot):
    seen = robot.describe(np.ones((480, 640, 3), np.uint8))
    assert seen == {"writeable": False, "owns": False, "sum": 480 * 640 * 3}
    with pytest.raises(ValueError, match="read-only"):
        robot.write_to(np.ones((480, 640, 3), np.uint8))


def test_results_may_be_views_until_the_next_call(service, ns_port):
    with get_shm_proxy(service.name, ns_port=ns_port, copy=False) as robot:
        first = robot.echo(np.arange(10_000))
        assert not first.flags.writeable and not first.flags.owndata and first[-1] == 9_999
        second = robot.echo(np.arange(10_000) + 1)
        assert second[-1] == 10_000


def test_torch_tensors_arrive_as_arrays(robot):
    np.testing.assert_array_equal(robot.echo(torch.arange(6.0).reshape(2, 3).T), np.arange(6.0).reshape(2, 3).T)
    with pytest.raises(TypeError, match="bfloat16"):
        robot.echo(torch.zeros(2, dtype=torch.bfloat16))


def test_marked_dataclasses_travel_as_themselves(robot):
    camera = robot.echo([Pinhole(640, 480, np.eye(3))])[0]
    assert type(camera) is Pinhole and camera.width == 640 and (camera.K == np.eye(3)).all()


@pytest.mark.parametrize("kind, builtin", [("ValueError", ValueError), ("KeyError", KeyError), ("OSError", OSError)])
def test_errors_arrive_with_their_type_and_the_remote_traceback(robot, kind, builtin):
    with pytest.raises(builtin, match="^front_cam is missing$") as caught:
        robot.fail(kind)
    assert isinstance(caught.value, RemoteError) and caught.value.remote_type == kind
    assert "service.py" in caught.value.remote_traceback and "raise kinds[kind]" in caught.value.remote_traceback


def test_an_error_type_unknown_to_the_client_arrives_as_its_built_in_base(robot):
    with pytest.raises(KeyError, match="front_cam") as caught:
        robot.fail("missing")
    assert caught.value.remote_type.endswith("CameraMissing")


def test_each_reply_says_where_its_time_went(robot):
    robot.sleep(0.05)
    assert robot.last_timing["total"] >= 0.05 and 0 <= robot.last_timing["transport"] < 0.05
    with pytest.raises(ValueError):
        robot.fail("ValueError")
    assert robot.last_timing["total"] >= 0.05, "the last call that was answered"


def test_a_method_that_exits_does_not_end_the_service(robot):
    with pytest.raises(RemoteError) as caught:
        robot.fail("exit")
    assert caught.value.remote_type == "SystemExit"
    assert robot.echo(1) == 1


def test_an_unsendable_argument_is_refused_by_its_path_and_the_session_goes_on(robot):
    robot.remember(7)
    with pytest.raises(TypeError, match=r"^echo: args\[0\]\['seen'\]: a builtins.set cannot travel"):
        robot.echo({"seen": {1, 2}})
    with pytest.raises(TypeError, match="objects"):
        robot.echo(np.array([object()]))
    with pytest.raises(TypeError, match=r"\['answer'\]\[1\]: a builtins.set cannot travel"):
        robot.unsendable()
    assert robot.recall() == 7


def test_a_message_beyond_the_limit_is_refused_before_it_is_sent(robot):
    with pytest.raises(ValueError, match="at most 67108864"):
        robot.echo(np.zeros(1 << 26, np.uint8))
    assert robot.echo(1) == 1


def test_only_exposed_methods_exist(robot):
    with pytest.raises(AttributeError, match="no method 'hidden'; it has clients, count"):
        robot.hidden()
    with pytest.raises(AttributeError):
        robot._call("hidden")
    assert "echo" in dir(robot) and not hasattr(robot, "__len__")


def test_a_closed_client_says_so(service, ns_port):
    robot = get_shm_proxy(service.name, ns_port=ns_port)
    robot.close()
    robot.close()
    with pytest.raises(TransportError, match="is closed"):
        robot.echo(1)


def test_an_unknown_name_and_a_missing_name_server_say_what_to_do(ns_port):
    with pytest.raises(UnknownName, match="knows no 'nobody'; start the service, or wait until it prints ready"):
        get_shm_proxy("nobody", ns_port=ns_port)
    with pytest.raises(TransportError, match="pyro4-ns -p 1,"):
        get_shm_proxy("apt_control", ns_port=1)
    with pytest.raises(ValueError, match="timeout"):
        get_shm_proxy("apt_control", timeout=0)


def test_marks_are_for_public_methods_and_dataclasses():
    with pytest.raises(ValueError, match="private"):
        expose(_private)
    with pytest.raises(TypeError, match="functions and classes"):
        expose(3)
    with pytest.raises(TypeError, match="dataclasses"):
        dive_into(dict)


def _private() -> None:
    """Not for clients."""
