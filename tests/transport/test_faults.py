"""Deaths, restarts and hostile peers, with real processes and a real name server."""

from __future__ import annotations

import contextlib
import os
import pickle
import random
import shutil
import signal
import socket
import struct
import subprocess
import threading
import time

import numpy as np
import Pyro4
import pytest
from Pyro4 import message

from shm_transport import CallTimeout, SessionLost, TransportError, connection_info, get_shm_proxy, wire
from shm_transport.channel import TOKEN_BYTES, Channel
from shm_transport.encoder import Encoder
from shm_transport.names import NameServer, parse_uri
from shm_transport.segments import DIRECTORY, PREFIX, Segment, reclaim_stale, stale_segments
from shm_transport.server import ShmServer
from tests.transport.conftest import free_port, running, running_name_server, running_service, wait_until

FRAME = np.arange(3 * 480 * 640, dtype=np.uint8).reshape(3, 480, 640)

# A client that does what the first argument says, with the service at the second; it prints "ready" before.
CLIENT = """
import os, sys, time
import numpy as np
from shm_transport import get_shm_proxy
robot = get_shm_proxy(sys.argv[2])
robot.echo(np.zeros(1 << 20, np.uint8))
print("ready", flush=True)
if sys.argv[1] == "sleep":
    robot.sleep(60.0)
elif sys.argv[1] == "raise":
    raise SystemExit("a mistake")
elif sys.argv[1] == "wait":
    time.sleep(60.0)
"""


def segments_of(pid: int) -> list[str]:
    return [name for name in os.listdir(DIRECTORY) if name.startswith(f"{PREFIX}{pid}-")]


def test_a_client_killed_in_a_call_leaves_nothing_and_the_service_goes_on(service, robot):
    with running("-c", CLIENT, "sleep", service.uri) as client:
        assert client.line() == "ready"
        wait_until(lambda: [c for c in robot.clients() if c["pid"] == client.pid and c["running"] == "sleep"])
        client.kill()
        wait_until(lambda: not segments_of(client.pid), 5)
        wait_until(lambda: [c for c in robot.clients() if c["pid"] == client.pid and not c["connected"]], 5)
        np.testing.assert_array_equal(robot.echo(FRAME), FRAME)


@pytest.mark.parametrize("end", ["raise", "return", "SIGTERM", "SIGKILL"])
def test_however_a_client_ends_its_segments_and_its_session_go(service, robot, end):
    do = {"SIGTERM": "wait", "SIGKILL": "wait"}.get(end, end)
    with running("-c", CLIENT, do, service.uri) as client:
        assert client.line() == "ready"
        if end == "SIGTERM":
            client.terminate()
        elif end == "SIGKILL":
            client.kill()
        client.popen.wait(10)
        wait_until(lambda: not segments_of(client.pid), 5)
        wait_until(lambda: client.pid not in [c["pid"] for c in robot.clients()], 5)


@pytest.mark.parametrize("services", [5, pytest.param(60, marks=pytest.mark.slow)])
def test_services_hit_by_any_number_of_signals_at_any_moment_are_gone_in_time_and_leave_nothing(ns_port, services):
    rng = random.Random(services)
    for number in range(services):
        name = f"hit_{services}_{number}"
        with running_service("--name", name, "--ns-port", str(ns_port)) as service:
            proxy = get_shm_proxy(name, ns_port=ns_port) if number % 2 else None
            time.sleep(rng.choice([0.0, rng.uniform(0, 0.2)]))
            for _ in range(rng.randint(1, 20)):
                service.popen.send_signal(rng.choice([signal.SIGTERM, signal.SIGINT]))
                time.sleep(rng.choice([0.0, rng.uniform(0, 0.02)]))
            said = service.popen.communicate(timeout=10)[0]
            assert said == "ended\n", said
            if proxy is not None:
                proxy.close()
            assert not segments_of(service.pid) and NameServer("localhost", ns_port).find(name) is None


def test_a_service_killed_in_a_call_is_a_prompt_named_error():
    with running_service() as service:
        robot = get_shm_proxy(service.uri, timeout=20.0)
        robot.echo(FRAME)
        threading.Timer(0.3, service.kill).start()
        started = time.monotonic()
        with pytest.raises(
            SessionLost, match="sleep: the connection to PYRO:.* broke .*prompt, frames and settings are gone"
        ):
            robot.sleep(60.0)
        assert time.monotonic() - started < 5
        assert not segments_of(os.getpid()) and not segments_of(service.pid)
        service.popen.wait(10)
        with pytest.raises(TransportError, match="does not answer at .*start it again") as caught:
            robot.echo(1)
        assert not isinstance(caught.value, SessionLost)
        robot.close()


def test_a_suspended_service_is_a_timeout_and_the_next_call_is_a_new_session():
    with running_service() as service, get_shm_proxy(service.uri, timeout=1.0) as robot:
        assert robot.count() == 1
        service.suspend()
        with pytest.raises(
            CallTimeout, match=r"no reply from .* within 1 s.*prompt, frames and settings are gone"
        ) as caught:
            robot.count()
        assert isinstance(caught.value, TimeoutError) and isinstance(caught.value, SessionLost)
        with pytest.raises(TransportError, match="gives no answer; is the service suspended"):
            robot.count()
        service.resume()
        assert robot.count() == 1, "a new session"


def test_after_a_restart_the_loss_is_said_once_and_the_client_works_anew(ns_port):
    arguments = ("--name", "restarted", "--ns-port", str(ns_port))
    with running_service(*arguments) as first:
        robot = get_shm_proxy("restarted", ns_port=ns_port, timeout=10.0)
        robot.remember("the prompt")
        first.kill()  # its name stays registered
    with running_service(*arguments):
        with pytest.raises(SessionLost):
            robot.recall()
        assert robot.recall() is None
        np.testing.assert_array_equal(robot.echo(FRAME), FRAME)
        robot.close()


def test_a_name_in_use_is_not_taken(service, ns_port):
    with running("-m", "tests.transport.service", "--name", service.name, "--ns-port", str(ns_port)) as second:
        said = second.popen.communicate(timeout=20)[0]
        assert "belongs to a running service" in said and second.popen.returncode == 1


def test_a_service_without_name_server_says_what_to_start():
    port = free_port()
    with running("-m", "tests.transport.service", "--name", "lonely", "--ns-port", str(port)) as service:
        assert f"start one with: pyro4-ns -p {port}" in service.popen.communicate(timeout=20)[0]


def test_a_restarted_name_server_learns_the_name_again():
    port = free_port()
    with contextlib.ExitStack() as stack:
        with running_name_server(port):
            service = stack.enter_context(running_service("--name", "kept", "--ns-port", str(port)))
            robot = stack.enter_context(get_shm_proxy("kept", ns_port=port))
            robot.remember("the prompt")
        assert robot.recall() == "the prompt", "calls need no name server"
        with running_name_server(port):
            wait_until(lambda: "kept" in NameServer("localhost", port).names(), 10)
            with get_shm_proxy("kept", ns_port=port) as another:
                assert another.pid() == service.pid
        assert robot.recall() == "the prompt"


def test_sigterm_ends_a_service_cleanly_and_removes_its_name(ns_port):
    with running_service("--name", "terminated", "--ns-port", str(ns_port)) as service:
        robot = get_shm_proxy("terminated", ns_port=ns_port)
        robot.echo(FRAME)
        result: list = []
        call = threading.Thread(target=lambda: result.append(robot.sleep(0.5)))
        call.start()
        time.sleep(0.2)
        assert service.terminate().endswith("ended\n")
        assert service.popen.returncode == 0
        call.join(5)
        assert result == ["awake"], "a running call may still reply"
        with pytest.raises(TransportError, match="knows no 'terminated'"):
            get_shm_proxy("terminated", ns_port=ns_port)
        robot.close()
        assert not segments_of(service.pid)


def test_segments_of_dead_owners_are_reclaimed_and_living_ones_are_kept(service):
    abandon = (
        "import os; from shm_transport.segments import Segment; print(Segment(9000).name, flush=True); os._exit(1)"
    )
    living = Segment(9000)
    with running("-c", abandon) as owner:
        name = owner.line()
        owner.popen.wait(10)
        path = os.path.join(DIRECTORY, name)
        wait_until(lambda: not os.path.exists(path), 5)  # by the service's watch
    assert os.path.exists(os.path.join(DIRECTORY, living.name))
    assert living.name not in reclaim_stale() and not stale_segments()
    assert os.stat(os.path.join(DIRECTORY, living.name)).st_mode & 0o777 == 0o600
    living.close()
    assert not os.path.exists(os.path.join(DIRECTORY, living.name))


def test_a_full_shared_memory_falls_back_to_the_socket_with_one_warning(service):
    # A process that may not write files of more than 2 MB meets the same error as in a full /dev/shm.
    client = """
import resource, sys
import numpy as np
from shm_transport import connection_info, get_shm_proxy
resource.setrlimit(resource.RLIMIT_FSIZE, (2 << 20, 2 << 20))
robot = get_shm_proxy(sys.argv[1])
for size in (1 << 20, 4 << 20, 5 << 20):
    got = robot.echo(np.arange(size, dtype=np.uint8))
    assert got.size == size and got[-1] == 255, size
assert connection_info(robot)["shared_memory"] and connection_info(robot)["segments_created"] == 1
print("correct")
"""
    with running("-c", client, service.uri) as process:
        said = process.popen.communicate(timeout=30)[0].splitlines()
        assert said[-1] == "correct" and len(said) == 2 and "large arrays go through the socket" in said[0]


@pytest.mark.parametrize("who", ["client", "service", "another /dev/shm"])
def test_without_common_shared_memory_everything_goes_through_the_socket(monkeypatch, who):
    if who == "another /dev/shm":  # as in a container: the name exists, but not for the service
        monkeypatch.setattr("shm_transport.channel.Probe.name", property(lambda self: f"{PREFIX}1-{'0' * 32}"))
    with running_service(*(["--no-shared-memory"] if who == "service" else [])) as service:
        with get_shm_proxy(service.uri, shared_memory=who != "client") as robot:
            assert not connection_info(robot)["shared_memory"]
            sent = {"frames": [FRAME, FRAME[:, ::2]], "small": np.arange(3)}
            np.testing.assert_equal(robot.echo(sent), sent)
            assert not robot.describe(FRAME)["writeable"]
            assert connection_info(robot)["segments_created"] == 0


def test_eight_clients_at_once_never_see_one_anothers_values(service, ns_port):
    failures: list = []

    def drive(number: int) -> None:
        rng = np.random.default_rng(number)
        with get_shm_proxy(service.name, ns_port=ns_port) as robot:
            for step in range(25):
                frame = np.full((64, 64, 3), 10 * number + step % 10, np.uint8)
                prompt = f"prompt of {number} at {step}"
                robot.remember(prompt if step % 2 else frame, wait=float(rng.uniform(0, 0.002)))
                if robot.count() != step + 1:
                    failures.append((number, step, "count"))
                got = robot.recall()
                if not (got == prompt if step % 2 else np.array_equal(got, frame)):
                    failures.append((number, step, got))

    threads = [threading.Thread(target=drive, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failures


def test_calls_of_different_clients_run_at_the_same_time(service):
    with get_shm_proxy(service.uri) as one, get_shm_proxy(service.uri) as other:
        threading.Thread(target=one.sleep, args=(1.0,)).start()
        started = time.monotonic()
        other.sleep(0.01)
        assert time.monotonic() - started < 0.9


def test_a_forked_child_opens_a_session_of_its_own(service):
    with get_shm_proxy(service.uri) as robot:
        assert robot.count() == 1
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            os.write(write, bytes([robot.count()]))
            os._exit(0)
        os.waitpid(child, 0)
        assert os.read(read, 1) == b"\x01" and robot.count() == 2
        os.close(read), os.close(write)


def raw_connection(uri: str, hello: dict | None = None) -> tuple[Channel, wire.Frame]:
    """A peer that shakes hands with a dict of its own; the service's answer."""
    at = parse_uri(uri)
    channel = Channel(wire.Stream(wire.connect(at.host, at.port, 5.0), 5.0), 1 << 26)
    proper = {"version": wire.PROTOCOL_VERSION, "object": at.object, "probe": None, "pid": os.getpid()}
    deadline = time.monotonic() + 5.0
    channel.stream.send(message.MSG_CONNECT, channel.encode({**proper, **(hello or {})}), deadline)
    return channel, channel.stream.receive(1 << 20, deadline)


@pytest.mark.parametrize(
    "hello, reason",
    [
        ({"version": 99}, "the client speaks version 99 of the protocol, this service 2"),
        ({"object": "another"}, "not the service that was asked for"),
        ({"pid": "one"}, "a handshake with other fields"),
        ({"more": 1}, "a handshake with other fields"),
    ],
)
def test_a_wrong_handshake_is_refused_by_name(service, hello, reason):
    channel, answer = raw_connection(service.uri, hello)
    assert answer.type == message.MSG_CONNECTFAIL and reason in wire.read_literal(answer)
    channel.close()


def test_an_ordinary_pyro4_proxy_is_refused_in_words_and_its_ping_is_answered(service):
    with Pyro4.Proxy(service.uri) as proxy:
        with pytest.raises(Pyro4.errors.CommunicationError, match="connect with shm_transport.get_shm_proxy"):
            proxy._pyroBind()


def test_a_probe_cannot_read_what_is_not_a_token(service):
    with contextlib.closing(Segment(4096)) as data:
        channel, answer = raw_connection(service.uri, {"probe": data.name})
        assert channel.decode(answer.data, copy=True)["token"] is None
        channel.close()


def test_one_client_too_many_is_refused_with_what_to_set():
    limits = {"PYRO_THREADPOOL_SIZE": "2", "PYRO_THREADPOOL_SIZE_MIN": "1"}
    with running_service(env=limits) as service, contextlib.ExitStack() as stack:
        first = stack.enter_context(get_shm_proxy(service.uri))
        stack.enter_context(get_shm_proxy(service.uri))
        with pytest.raises(TransportError, match="no more than 2 clients at once; PYRO_THREADPOOL_SIZE"):
            get_shm_proxy(service.uri)
        first.close()
        wait_until(lambda: can_connect(service.uri))


def can_connect(uri: str) -> bool:
    try:
        get_shm_proxy(uri).close()
        return True
    except TransportError:
        return False


def test_listening_beyond_this_host_is_warned_of(caplog):
    server = ShmServer(dict, host="0.0.0.0")
    assert "neither encrypted nor authenticated" in caplog.text and "SSH tunnel" in caplog.text
    assert parse_uri(server.uri).host not in ("", "0.0.0.0")
    server.shutdown()
    with pytest.raises(RuntimeError, match="serves once"):
        server.start()


@pytest.mark.skipif(shutil.which("openssl") is None, reason="makes a certificate with openssl")
def test_tls_as_pyro4_is_configured_for_it(tmp_path):
    """The service, the name server and the client with one certificate, by Pyro4's own environment variables."""
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", key, "-out", certificate, "-days", "2",
         "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"],
        check=True, capture_output=True,
    )  # fmt: skip
    at_service = {"PYRO_SSL": "1", "PYRO_SSL_SERVERCERT": str(certificate), "PYRO_SSL_SERVERKEY": str(key)}
    client = """
import sys
import numpy as np
from shm_transport import connection_info, get_shm_proxy
for shared in (True, False):
    with get_shm_proxy(sys.argv[1], shared_memory=shared) as robot:
        frame = np.arange(1 << 20, dtype=np.uint8)
        assert (robot.echo(frame) == frame).all() and connection_info(robot)["shared_memory"] == shared
print("encrypted")
"""
    at_client = {"PYRO_SSL": "1", "PYRO_SSL_CACERTS": str(certificate)}
    with running_service(env=at_service) as service:
        with running("-c", client, service.uri, env=at_client) as process:
            assert process.popen.communicate(timeout=30)[0].endswith("encrypted\n")
        with pytest.raises(TransportError, match="only one side uses TLS: PYRO_SSL"):
            get_shm_proxy(service.uri, timeout=5.0)  # without TLS


@pytest.mark.parametrize("serializer", [1, 2, 3, 4, 5, 6, 7, 0x4150])
def test_a_pickle_in_any_serialisers_name_is_refused_and_not_executed(service, tmp_path, serializer):
    canary = tmp_path / "executed"

    class Bomb:
        def __reduce__(self):
            return (os.mkdir, (str(canary),))

    for flags in (0, message.FLAGS_BATCH, message.FLAGS_COMPRESSED, message.FLAGS_KEEPSERIALIZED):
        channel, answer = raw_connection(service.uri)
        assert answer.type == message.MSG_CONNECTOK
        deadline = time.monotonic() + 5.0
        bomb = pickle.dumps((service.uri, "echo", (Bomb(),), {}))
        channel.stream.send(message.MSG_INVOKE, [bomb], deadline, 1, flags, serializer)
        reply = channel.stream.receive(1 << 20, deadline)
        assert reply.flags & message.FLAGS_EXCEPTION
        assert channel.decode(reply.data, copy=True)["type"].endswith("MalformedMessage")
        channel.close()
    at = parse_uri(service.uri)
    with wire.connect(at.host, at.port, 5.0) as sock:  # in the handshake too
        stream = wire.Stream(sock, 5.0)
        stream.send(message.MSG_CONNECT, [pickle.dumps(Bomb())], time.monotonic() + 5.0, serializer=serializer)
        assert stream.receive(1 << 20, time.monotonic() + 5.0).type == message.MSG_CONNECTFAIL
    assert not canary.exists()


def test_a_reply_in_pickle_is_not_read_by_the_client(tmp_path):
    canary = tmp_path / "executed"

    class Bomb:
        def __reduce__(self):
            return (os.mkdir, (str(canary),))

    for kind in (message.MSG_CONNECTOK, message.MSG_CONNECTFAIL):
        with socket.create_server(("127.0.0.1", 0)) as listener:

            def answer(listener=listener, kind=kind) -> None:
                sock, _ = listener.accept()
                with sock:
                    stream = wire.Stream(sock, 5.0)
                    stream.receive(1 << 20)
                    stream.send(kind, [pickle.dumps(Bomb())], time.monotonic() + 5.0, serializer=4)

            thread = threading.Thread(target=answer)
            thread.start()
            with pytest.raises(TransportError, match="speaks another protocol"):
                get_shm_proxy(f"PYRO:x@127.0.0.1:{listener.getsockname()[1]}", timeout=5.0)
            thread.join(5)
    assert not canary.exists()


def test_a_segment_that_is_not_the_peers_to_name_is_refused(service, tmp_path):
    secret = tmp_path / "secret"
    secret.write_bytes(b"secret" * 2000)
    link = f"{PREFIX}1-{'a' * 32}"
    os.symlink(secret, os.path.join(DIRECTORY, link))
    short = Segment(4096)
    try:
        for name, used, reason in [
            ("../../etc/passwd", 10, "is not the name of a segment"),
            (link, 10, "cannot be opened"),
            (f"{PREFIX}1-{'b' * 32}", 10, "cannot be opened"),
            (short.name, 4097, "uses 4097 bytes of a segment of 4096"),
        ]:
            # The handshake agrees on shared memory, then the message names something else.
            probe = Segment(TOKEN_BYTES)
            channel, answer = raw_connection(service.uri, {"probe": probe.name})
            assert channel.decode(answer.data, copy=True)["token"] == bytes(32)
            prelude = struct.pack("<HxxxxxxQ", len(name), used) + name.encode()
            body = prelude + bytes(-len(prelude) % 16) + b"".join(Encoder().encode(("echo", (1,), {})))
            deadline = time.monotonic() + 5.0
            channel.stream.send(message.MSG_INVOKE, [body], deadline)
            reply = channel.decode(channel.stream.receive(1 << 20, deadline).data, copy=True)
            assert reply["type"].endswith("MalformedMessage") and reason in reply["message"], reply
            channel.close()
            probe.close()
        assert secret.exists()
    finally:
        short.close()
        os.unlink(os.path.join(DIRECTORY, link))


@pytest.mark.parametrize("count", [300, pytest.param(10_000, marks=pytest.mark.slow)])
def test_broken_messages_over_the_socket_leave_the_service_well(service, robot, count):
    rng = random.Random(1)
    robot.remember("untouched")
    before = robot.resources()
    valid = b"".join(bytes(part) for part in raw_connection_call())
    at = parse_uri(service.uri)
    for number in range(300):
        with socket.create_connection((at.host, at.port), 5.0) as sock:
            if number % 3 == 0:  # not even a frame
                sock.sendall(rng.randbytes(rng.randrange(1, 100)))
            elif number % 3 == 1:  # a good frame around a bad handshake, or one that promises too much
                stream = wire.Stream(sock, 5.0)
                stream.send(message.MSG_CONNECT, [rng.randbytes(rng.randrange(300))], time.monotonic() + 5.0)
                if number % 2:
                    stream.receive(1 << 20, time.monotonic() + 5.0)
            else:
                sock.sendall(struct.pack("!4sHHHHiHHHH", b"PYRO", 48, 4, 0, 0, 1 << 30, 0x4150, 0, 0, 0))
    channel, _ = raw_connection(service.uri)
    deadline = time.monotonic() + 60.0
    refused = 0
    for _ in range(count):  # on an open session: each gets its refusal, and the session goes on
        broken = bytearray(valid)
        for _ in range(rng.randrange(1, 5)):
            broken[rng.randrange(16, len(broken))] = rng.randrange(256)
        channel.stream.send(message.MSG_INVOKE, [bytes(broken)], deadline)
        refused += channel.stream.receive(1 << 22, deadline).flags & message.FLAGS_EXCEPTION
    assert refused > count // 2
    channel.close()
    assert robot.recall() == "untouched"
    wait_until(lambda: robot.resources()["fds"] <= before["fds"] + 2, 10)


def raw_connection_call() -> list:
    """A valid call's payload."""
    call = ("echo", ({"cam": {"K": np.eye(3), "name": "wrist"}, "t": [1, 2.5, None]},), {})
    return [struct.pack("<HxxxxxxQ", 0, 0), *Encoder().encode(call)]
