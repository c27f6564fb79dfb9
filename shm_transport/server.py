"""The server: one session object per client, its exposed methods called by that client alone.

    class Session:
        @expose
        def add_obs_frame(self, frame): ...

    server = ShmServer(Session, host="localhost", port=0)
    server.register("apt_control", ns_host="localhost", ns_port=9091)
    server.serve_forever()

Arrays in a method's arguments are read-only views on the client's shared memory, valid during the call: a session
copies what it keeps. Calls of different clients run at the same time, each in its connection's thread.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
import traceback
from typing import Any, Callable

from Pyro4 import core, errors, message, socketutil

from . import wire
from .channel import Channel, answer_probe
from .end_wish import EndWish
from .errors import MalformedMessage, TransportError, Unsendable, describe_exception
from .marks import exposed_methods
from .names import DEFAULT_PORT, Location, NameServer
from .segments import reclaim_stale

log = logging.getLogger("shm_transport")

HANDSHAKE_TIMEOUT_S = 5.0
WATCH_EVERY_S = 1.0
#: how soon a signal is noticed
LOOK_EVERY_S = 0.1
REGISTER_EVERY_S = 3.0
#: calls that run when the server ends may still reply within so many seconds
GRACE_S = 2.0
_LOCAL = ("localhost", "127.0.0.1", "::1")


class Client:
    """One connected client, on the server's side: its session and what is known of it."""

    def __init__(self, number: int, channel: Channel, host: str, pid: int | None, session: Any):
        self.number = number
        self.channel = channel
        self.host = host
        self.pid = pid
        self.session = session
        self.methods = exposed_methods(session)
        self.names = list(self.methods)
        self.methods[wire.PING] = lambda payload: None
        self.since = time.time()
        self.calls = 0
        self.last_call: float | None = None
        self.seconds_in_call = 0.0
        self.running: str | None = None
        self.gone = False

    def statistics(self) -> dict[str, Any]:
        """This client as plain data."""
        return {
            "id": self.number,
            "host": self.host,
            "pid": self.pid,
            "connected": not self.gone,
            "connected_since": self.since,
            "shared_memory": self.channel.shared,
            "calls": self.calls,
            "last_call": self.last_call,
            "running": self.running,
            "seconds_in_call": self.seconds_in_call,
            "received_bytes": self.channel.received_bytes,
            "sent_bytes": self.channel.sent_bytes,
            "segments_created": self.channel.segments_created,
            "session": self._session_says("statistics"),
        }

    def _session_says(self, method: str) -> dict[str, Any]:
        """What the session's own hook of this name returns, if it has one."""
        hook = getattr(self.session, method, None)
        return hook() if callable(hook) else {}

    def answer(self, frame: wire.Frame) -> tuple[list[Any], int]:
        """Run the call in a message: the reply's parts and flags. Whatever the method raises is a reply."""
        started = time.monotonic()
        try:
            name, args, kwargs = self._read(frame)
            self.running = name
            result = self.methods[name](*args, **kwargs)
            timing = {**self._session_says("take_timing"), "total": time.monotonic() - started}
            try:
                return self.channel.encode((result, timing)), 0
            except Unsendable as error:
                error.path[-1] = f"{name}: result"
                raise
        except BaseException as error:  # a SystemExit in a method must not end the service's thread unanswered
            text = traceback.format_exc()
            return self.channel.encode(describe_exception(error, text)), message.FLAGS_EXCEPTION
        finally:
            self.running = None
            self.calls += 1
            self.last_call = time.time()
            self.seconds_in_call += time.monotonic() - started

    def _read(self, frame: wire.Frame) -> tuple[str, tuple, dict[str, Any]]:
        if frame.serializer != wire.SERIALIZER_ID:
            raise MalformedMessage(f"payloads in serialiser {frame.serializer} are not accepted; use get_shm_proxy")
        if frame.flags:
            raise MalformedMessage(f"calls with flags {frame.flags:#x} are not accepted")
        call = self.channel.decode(frame.data, copy=False)
        if not isinstance(call, tuple) or [type(part) for part in call] != [str, tuple, dict]:
            raise MalformedMessage("a call is (method, arguments, keyword arguments)")
        name, args, kwargs = call
        if name not in self.methods:
            raise AttributeError(f"the service has no method {name[:80]!r}; it has {', '.join(self.names)}")
        return name, args, kwargs


class _Daemon(core.Daemon):
    """Pyro4's daemon (sockets, a thread per connection) with messages of our own: its serialisers, its metadata and its
    attribute access are never reached."""

    def __init__(self, server: "ShmServer", host: str, port: int):
        self._server = server
        super().__init__(host=host, port=port)

    def _handshake(self, conn: Any, denied_reason: str | None = None) -> bool:
        return self._server._open(conn.sock, conn, denied_reason)

    def handleRequest(self, conn: Any) -> None:
        try:
            self._server._serve(conn)
        except wire.PeerGone as error:
            raise errors.ConnectionClosedError(str(error)) from None
        except wire.TimedOut:
            raise errors.ConnectionClosedError("a message that was not completed in time") from None
        except MalformedMessage as error:
            log.warning("closing a connection: %s", error)
            raise errors.ConnectionClosedError(str(error)) from None

    def clientDisconnect(self, conn: Any) -> None:
        self._server._forget(conn)


class ShmServer:
    """Serves sessions made by ``make_session()``, one for each client that connects."""

    def __init__(
        self,
        make_session: Callable[[], Any],
        host: str = "localhost",
        port: int = 0,
        max_message_bytes: int = wire.MAX_MESSAGE_BYTES,
        shared_memory: bool = True,
        grace_s: float = GRACE_S,
    ):
        """Begin to listen, on a free port if 0.

        Args:
            make_session: gives an object whose methods marked by ``@expose`` the client may call. Called in the
                client's thread. If it has ``close()``, that is called when the client has gone; if ``take_timing()``,
                the seconds of a call's stages that it returns (a dict) go with the reply; if ``statistics()``, what it
                returns (a dict) is part of ``clients()``.
            host: the interface to listen on. The protocol is neither encrypted nor authenticated; other hosts should
                come in through an SSH tunnel.
            max_message_bytes: of one call or reply, arrays included.
            shared_memory: False sends everything through the socket.
            grace_s: seconds in which calls that run at the end may still reply.

        Raises OSError if the port is taken, ValueError for a bad argument."""
        if not 1 << 12 <= max_message_bytes < 1 << 31:
            raise ValueError(f"max_message_bytes is {max_message_bytes}; wanted 4096 to 2 GiB")
        if host not in _LOCAL:
            log.warning(
                "listening on %s: traffic is neither encrypted nor authenticated, whoever reaches the port can use the "
                "service; prefer localhost and an SSH tunnel",
                host or "every interface",
            )
        self._make_session = make_session
        self._max_bytes = max_message_bytes
        self._may_share = shared_memory
        self._grace_s = grace_s
        self._clients: dict[Any, Client] = {}
        self._lock = threading.Lock()
        self._count = 0
        self._stop = threading.Event()
        self._watcher: threading.Thread | None = None
        self._name: str | None = None
        self._name_server: NameServer | None = None
        self._name_trouble = ""
        reclaim_stale()
        self._daemon = _Daemon(self, host, port)
        reachable = socketutil.getIpAddress("", workaround127=True) if host in ("", "0.0.0.0") else host
        self.location = Location("shm_transport." + secrets.token_hex(8), reachable, self._daemon.sock.getsockname()[1])

    @property
    def uri(self) -> str:
        """The address, which ``get_shm_proxy`` takes in place of a name."""
        return str(self.location)

    def register(self, name: str, ns_host: str = "localhost", ns_port: int = DEFAULT_PORT) -> None:
        """Make the service known under ``name``; to be called once it is ready. Kept up when the name server restarts.

        Raises NoNameServer, or TransportError if a living service has the name."""
        name_server = NameServer(ns_host, ns_port)
        other = name_server.find(name)
        if other is not None and other != self.location and is_alive(other):
            raise TransportError(
                f"the name {name!r} belongs to a running service at {other}; end that one or choose another"
            )
        name_server.register(name, self.location)
        self._name, self._name_server = name, name_server

    def clients(self) -> list[dict[str, Any]]:
        """Who is connected, as plain data: "id", "host", "pid", "connected" (False: gone, its call still runs),
        "connected_since" and "last_call" (seconds since 1970), "shared_memory", "calls", "running" (a method or None),
        "seconds_in_call", "received_bytes", "sent_bytes", "segments_created", "session" (its own statistics)."""
        with self._lock:
            return [client.statistics() for client in self._clients.values()]

    def start(self) -> None:
        """Serve in the background, until ``shutdown``. Raises RuntimeError if it serves already or has ended."""
        if self._watcher is not None or self._stop.is_set():
            raise RuntimeError("a server serves once; make another ShmServer")
        self._watcher = threading.Thread(target=self._watch, name="shm_transport-watch", daemon=True)
        threading.Thread(target=self._daemon.requestLoop, name="shm_transport-accept", daemon=True).start()
        self._watcher.start()

    def serve_forever(self, wish: EndWish | None = None) -> None:
        """Serve until ``shutdown`` is called or, in the main thread, SIGTERM or SIGINT arrives; then clean up.

        Args:
            wish: the context that catches these signals, where the caller has one already."""
        if wish is None:
            with EndWish() as own:
                return self.serve_forever(own)
        self.start()
        try:
            while not wish.wished and not self._stop.wait(LOOK_EVERY_S):
                pass
        finally:
            self.shutdown()

    def shutdown(self) -> None:
        """Stop serving: remove the name, let running calls reply, close every session. Safe to call twice."""
        self._stop.set()
        with self._lock:
            daemon, self._daemon = self._daemon, None
        if daemon is None:
            return
        with self._lock:
            for client in self._clients.values():
                client.channel.writes_inline = True
        if self._watcher is not None:
            self._watcher.join()  # it could register the name again
        self._remove_name()
        self._hang_up(socketutil.socket.SHUT_RD)
        deadline = time.monotonic() + self._grace_s
        while self._clients and time.monotonic() < deadline:
            time.sleep(0.01)
        self._hang_up(socketutil.socket.SHUT_RDWR)
        daemon.shutdown()
        for conn in list(self._clients):
            self._forget(conn)

    def _hang_up(self, how: int) -> None:
        with self._lock:
            clients = list(self._clients.values())
        for client in clients:
            try:
                client.channel.stream.sock.shutdown(how)
            except OSError:
                pass  # it has gone by itself

    def _open(self, sock: Any, conn: Any, denied_reason: str | None) -> bool:
        """The handshake with a new connection. False if it was refused."""
        deadline = time.monotonic() + HANDSHAKE_TIMEOUT_S
        stream = wire.Stream(sock, HANDSHAKE_TIMEOUT_S)
        channel = Channel(stream, self._max_bytes)
        try:
            if denied_reason:
                raise TransportError(
                    f"no more than {len(self._clients)} clients at once; PYRO_THREADPOOL_SIZE raises that"
                )
            if self._stop.is_set():
                raise TransportError("the service is ending")
            frame = stream.receive(min(self._max_bytes, 1 << 16), deadline)
            if frame.type == message.MSG_PING:
                stream.send(message.MSG_PING, [b"pong"], deadline, frame.seq, serializer=frame.serializer)
                return False
            hello = self._check_hello(frame, channel)
            token = answer_probe(hello["probe"]) if self._may_share else None
            try:
                session = self._make_session()
            except Exception as error:
                log.exception("no session could be made")
                raise TransportError(f"no session could be made: {type(error).__name__}: {error}") from error
            host, port = sock.getpeername()[:2]
            with self._lock:
                self._count += 1
                client = Client(self._count, channel, f"{host}:{port}", hello["pid"], session)
                self._clients[conn] = client
            answer = {
                "version": wire.PROTOCOL_VERSION,
                "token": token,
                "max_message_bytes": self._max_bytes,
                "methods": client.names,
            }
            stream.send(message.MSG_CONNECTOK, channel.encode(answer), deadline, frame.seq)
            channel.shared = token is not None
            return True
        except (wire.PeerGone, wire.TimedOut, OSError):
            self._forget(conn)
            return False
        except (MalformedMessage, TransportError) as error:
            log.warning("refusing a connection: %s", error)
            self._refuse(stream, str(error))
            return False

    def _check_hello(self, frame: wire.Frame, channel: Channel) -> dict[str, Any]:
        if frame.type != message.MSG_CONNECT or frame.flags & message.FLAGS_COMPRESSED:
            raise MalformedMessage("a connection begins with a plain connect message")
        if frame.serializer != wire.SERIALIZER_ID:
            raise MalformedMessage(
                f"payloads in serialiser {frame.serializer} are not accepted; connect with shm_transport.get_shm_proxy"
            )
        hello = channel.decode(frame.data, copy=True)
        version = hello.get("version") if isinstance(hello, dict) else None
        if version != wire.PROTOCOL_VERSION:
            raise TransportError(
                f"the client speaks version {version} of the protocol, this service {wire.PROTOCOL_VERSION}; use the "
                "shm_transport folder of the same release on both sides"
            )
        kinds = {"version": int, "object": str, "probe": (str, type(None)), "pid": int}
        if set(hello) != set(kinds) or not all(isinstance(hello[key], kind) for key, kind in kinds.items()):
            raise MalformedMessage("a handshake with other fields")
        if hello["object"] != self.location.object:
            raise TransportError("this is not the service that was asked for; look its name up again")
        return hello

    def _refuse(self, stream: wire.Stream, text: str) -> None:
        try:
            deadline = time.monotonic() + 1.0
            stream.send(message.MSG_CONNECTFAIL, [wire.text_payload(text)], deadline, serializer=wire.SERPENT_ID)
            # Closing with something unread would reset the connection, and the text be lost on its way.
            stream.sock.shutdown(socketutil.socket.SHUT_WR)
            stream.sock.recv(1 << 16)
        except (wire.PeerGone, wire.TimedOut, OSError):
            pass  # it need not listen

    def _serve(self, conn: Any) -> None:
        """Wait for one message and answer it."""
        client = self._clients[conn]
        stream = client.channel.stream
        if client.calls:
            stream.spin(wire.SPIN_S)
        frame = stream.receive(self._max_bytes)
        if frame.type == message.MSG_PING:
            deadline = time.monotonic() + wire.BODY_TIMEOUT_S
            stream.send(message.MSG_PING, [b"pong"], deadline, frame.seq, serializer=frame.serializer)
        elif frame.type == message.MSG_INVOKE:
            parts, flags = client.answer(frame)
            stream.send(message.MSG_RESULT, parts, time.monotonic() + wire.BODY_TIMEOUT_S, frame.seq, flags)
        else:
            raise MalformedMessage(f"a message of type {frame.type}")

    def _forget(self, conn: Any) -> None:
        """Close the session of a client that has gone."""
        with self._lock:
            client = self._clients.pop(conn, None)
        if client is None:
            return
        client.channel.close()
        close = getattr(client.session, "close", None)
        if callable(close):
            try:
                close()
            except Exception:
                log.exception("closing the session of client %d", client.number)

    def _watch(self) -> None:
        """Until the end: notice clients that died in a call, free what the dead left, keep the name registered."""
        next_name = time.monotonic() + REGISTER_EVERY_S
        while not self._stop.wait(WATCH_EVERY_S):
            reclaim_stale()
            with self._lock:
                running = [client for client in self._clients.values() if client.running and not client.gone]
            for client in running:
                if wire.peer_closed(client.channel.stream.sock):
                    client.gone = True
                    log.warning("client %d (%s) went away during %s", client.number, client.host, client.running)
            if self._name is not None and time.monotonic() >= next_name:
                self._keep_name()
                next_name = time.monotonic() + REGISTER_EVERY_S

    def _keep_name(self) -> None:
        """Register again if the name server has forgotten the name; say so once if it cannot be done."""
        trouble = ""
        try:
            found = self._name_server.find(self._name)
            if found is None:
                self._name_server.register(self._name, self.location)
                log.info("registered %s again: the name server was restarted", self._name)
            elif found != self.location:
                trouble = f"the name {self._name!r} now belongs to {found}; new clients go there"
        except TransportError as error:
            trouble = str(error)
        if trouble and trouble != self._name_trouble:
            log.warning("%s", trouble)
        self._name_trouble = trouble

    def _remove_name(self) -> None:
        if self._name is None:
            return
        try:
            if self._name_server.find(self._name) == self.location:
                self._name_server.remove(self._name)
        except TransportError as error:
            log.warning("the name %r could not be removed: %s", self._name, error)


def is_alive(location: Location, timeout: float = 2.0) -> bool:
    """Whether something at the address answers Pyro4's ping or handshake."""
    deadline = time.monotonic() + timeout
    try:
        with wire.connect(location.host, location.port, timeout) as sock:
            stream = wire.Stream(sock, timeout)
            stream.send(message.MSG_PING, [b"ping"], deadline)
            stream.receive(1 << 16, deadline)
            return True
    except (OSError, wire.PeerGone, wire.TimedOut, MalformedMessage):
        return False
