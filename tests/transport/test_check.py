"""``python -m shm_transport.check`` says what works and what to do about the rest."""

from __future__ import annotations

import os

from shm_transport import wire
from shm_transport.check import main
from shm_transport.segments import DIRECTORY, reclaim_stale
from tests.transport.conftest import free_port, running, running_service


def lines(capsys, *arguments: str, code: int) -> list[str]:
    assert main([str(argument) for argument in arguments]) == code
    return capsys.readouterr().out.splitlines()


def test_a_good_set_up_is_all_ok(service, ns_port, capsys):
    said = lines(capsys, "--ns-port", ns_port, "--name", service.name, code=0)
    text = "\n".join(said)
    assert all(line.startswith("ok") or "segments of dead" in line for line in said), text
    for part in (
        f"{service.name} is registered",
        f"answers in version {wire.PROTOCOL_VERSION}",
        "sees this process's shared memory",
    ):
        assert part in text
    assert "round trip of 3 images of 480 x 640 through shared memory" in text


def test_the_command_itself_fails_with_what_to_do_where_no_name_server_runs():
    port = free_port()
    with running("-m", "shm_transport.check", "--ns-port", str(port), "--name", "apt_control") as check:
        said = check.popen.communicate(timeout=30)[0]
        assert check.popen.returncode == 2
        assert f"FAIL  no name server at localhost:{port}" in said and f"pyro4-ns -p {port}" in said


def test_an_unknown_name_and_a_dead_service_fail(ns_port, capsys):
    assert "FAIL" in lines(capsys, "--ns-port", ns_port, "--name", "nobody", code=2)[-1]
    with running_service("--name", "dead", "--ns-port", str(ns_port)) as service:
        service.kill()
    assert "start it again" in lines(capsys, "--ns-port", ns_port, "--name", "dead", code=2)[-1]


def test_another_host_is_noted_and_works(ns_port, capsys):
    with running_service("--name", "far", "--ns-port", str(ns_port), "--no-shared-memory"):
        said = "\n".join(lines(capsys, "--ns-port", ns_port, "--name", "far", code=0))
        assert "note  the service does not see this process's shared memory" in said
        assert "3 images of 480 x 640 through the socket" in said


def test_left_over_segments_are_counted(ns_port, capsys):
    abandon = (
        "import os; from shm_transport.segments import Segment; print(Segment(9000).name, flush=True); os._exit(1)"
    )
    with running("-c", abandon) as owner:
        path = os.path.join(DIRECTORY, owner.line())
        owner.popen.wait(10)
    said = "\n".join(lines(capsys, "--ns-port", ns_port, code=0))
    assert "1 segments of dead processes" in said or not os.path.exists(path)  # a running service may be first
    assert "give its name: --name" in said
    reclaim_stale()
    assert "no segments of dead processes" in "\n".join(lines(capsys, "--ns-port", ns_port, code=0))
