"""The client: an object with the methods of a service that runs in another process.

Needs numpy and Pyro4 alone, on Python 3.8 or later, so that a robot's own environment can use it.
"""

from __future__ import annotations

import atexit
import functools
import os
import threading
import time
import weakref
from typing import Any

from Pyro4 import message

from . import wire
from .channel import Channel, Probe
from .errors import CallTimeout, MalformedMessage, SessionLost, TransportError, Unsendable, rebuild_exception
from .names import DEFAULT_PORT, Location, NameServer, parse_uri
from .segments import reclaim_stale

_SESSION_GONE = (
    "The session's prompt, frames and settings are gone and must be set again: the next call begins a new session with "
    "the service's defaults"
)

_open_proxies: "weakref.WeakSet[ShmProxy]" = weakref.WeakSet()


def get_shm_proxy(
    name: str,
    ns_host: str = "localhost",
    ns_port: int = DEFAULT_PORT,
    timeout: float = 30.0,
    *,
    copy: bool = True,
    shared_memory: bool = True,
) -> "ShmProxy":
    """Connect to the service registered as ``name`` (or at an address, ``PYRO:object@host:port``).

    Args:
        name: the service's name with the name server at ``ns_host:ns_port``.
        timeout: seconds that a call may take, and connecting too. Then CallTimeout.
        copy: results are the caller's own. False saves a copy: arrays of a result are then read-only views, valid
            until the next call.
        shared_memory: False sends everything through the socket, as with a service on another host.

    Returns a proxy with the service's methods. It is one session: nobody else sees its state. It may be shared between
    threads, whose calls then take turns. ``close()``, or a ``with`` block, ends the session.

    Raises TransportError if the service cannot be reached; the message says what to do."""
    return ShmProxy(name, NameServer(ns_host, ns_port, timeout=min(timeout, 5.0)), timeout, copy, shared_memory)


class ShmProxy:
    """See ``get_shm_proxy``. What is not a service's method begins with an underscore, apart from ``close`` and
    ``last_timing``: seconds of the last call that was answered, "total" on the service with its stages where it tells
    them, and "transport", all the rest of the round trip."""

    def __init__(self, name: str, name_server: NameServer, timeout: float, copy: bool, shared_memory: bool):
        if not 0 < timeout < float("inf"):
            raise ValueError(f"timeout is {timeout}; wanted seconds, above 0 (a call without one could hang for ever)")
        self._name = name
        self._name_server = name_server
        self._timeout = timeout
        self._copy = copy
        self._may_share = shared_memory
        self._lock = threading.RLock()
        self._channel: Channel | None = None
        self._closed = False
        self._methods: list[str] = []
        self._location: Location | None = None
        self._seq = 0
        self._pid = os.getpid()
        self.last_timing: dict[str, float] = {}
        self._connect(time.monotonic() + timeout)
        _open_proxies.add(self)

    def __getattr__(self, method: str) -> Any:
        if method.startswith("_"):
            raise AttributeError(method)
        if method not in self._methods:
            raise AttributeError(
                f"the service {self._name!r} has no method {method!r}; it has {', '.join(self._methods)}"
            )
        return functools.partial(self._call, method)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *self._methods})

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"at {self._location}" if self._channel else "not connected"
        return f"<client of {self._name!r}, {state}>"

    def __enter__(self) -> "ShmProxy":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """End the session. Safe to call twice."""
        with self._lock:
            self._closed = True
            self._disconnect()

    def _call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        with self._lock:
            began = time.monotonic()
            deadline = began + self._timeout
            channel = self._connected(deadline)
            # A value that cannot travel is found here, before anything is sent: the session goes on.
            try:
                parts = channel.encode((method, args, kwargs))
            except Unsendable as error:
                error.path[-1] = f"{method}: args" if error.path[-1] == "[1]" else f"{method}: kwargs"
                raise
            self._seq = self._seq + 1 & 0xFFFF
            try:
                channel.stream.send(message.MSG_INVOKE, parts, deadline, self._seq)
                channel.stream.spin(wire.SPIN_S)
                frame = channel.stream.receive(channel.max_bytes, deadline, self._timeout)
                if (frame.type, frame.serializer, frame.seq) != (message.MSG_RESULT, wire.SERIALIZER_ID, self._seq):
                    raise MalformedMessage("a reply that does not belong to the call")
                failed = frame.flags & message.FLAGS_EXCEPTION
                result = channel.decode(frame.data, copy=self._copy or bool(failed))
                if not failed and not _is_reply(result):
                    raise MalformedMessage("a reply without its timing")
            except wire.TimedOut:
                self._disconnect()
                raise CallTimeout(
                    f"{self._name}.{method}: no reply from {self._location} within {self._timeout:g} s. Is the service "
                    f"suspended, or busy with others? get_shm_proxy takes a longer timeout. {_SESSION_GONE}"
                ) from None
            except (wire.PeerGone, MalformedMessage) as error:
                self._disconnect()
                raise SessionLost(
                    f"{self._name}.{method}: the connection to {self._location} broke ({error}): the service has ended "
                    f"or was restarted. {_SESSION_GONE}"
                ) from None
            except BaseException:
                self._disconnect()  # a late reply must not be taken for the next call's
                raise
            if failed:
                raise rebuild_exception(result)
            result, timing = result
            self.last_timing = {**timing, "transport": max(0.0, time.monotonic() - began - timing["total"])}
            return result

    def _connected(self, deadline: float) -> Channel:
        if self._closed:
            raise TransportError(f"this client of {self._name!r} is closed; make a new one with get_shm_proxy")
        if self._pid != os.getpid():
            # In a forked child. The connection stays the parent's; the child opens a session of its own.
            self._pid = os.getpid()
            self._channel = None
        if self._channel is None:
            self._connect(deadline)
        return self._channel

    def _connect(self, deadline: float) -> None:
        """Open a session: find the service, shake hands, find out whether both see one shared memory."""
        location = parse_uri(self._name) if self._name.startswith("PYRO:") else self._name_server.lookup(self._name)
        try:
            sock = wire.connect(location.host, location.port, max(deadline - time.monotonic(), 0.001))
        except OSError as error:
            raise TransportError(
                f"the service {self._name!r} does not answer at {location} ({error}); it may be loading again, or have "
                f"ended without removing its name: then start it again. {wire.TLS_HINT}"
            ) from None
        channel = Channel(wire.Stream(sock, self._timeout), wire.MAX_MESSAGE_BYTES)
        probe = Probe() if self._may_share else None
        try:
            hello = {
                "version": wire.PROTOCOL_VERSION,
                "object": location.object,
                "probe": probe.name if probe is not None else None,
                "pid": os.getpid(),
            }
            channel.stream.send(message.MSG_CONNECT, channel.encode(hello), deadline)
            frame = channel.stream.receive(wire.MAX_MESSAGE_BYTES, deadline)
            answer = self._accepted(frame, channel, location)
            channel.shared = probe is not None and probe.confirms(answer["token"])
            channel.max_bytes = answer["max_message_bytes"]
        except wire.TimedOut:
            channel.close()
            raise TransportError(
                f"{location} accepts connections but gives no answer; is the service suspended? {wire.TLS_HINT}"
            ) from None
        except wire.PeerGone as error:
            channel.close()
            raise TransportError(
                f"{location} broke off the handshake ({error}); is the service ending? {wire.TLS_HINT}"
            ) from None
        except MalformedMessage as error:
            channel.close()
            raise TransportError(
                f"what listens at {location} speaks another protocol ({error}); is {self._name!r} the right "
                f"name? {wire.TLS_HINT}"
            ) from None
        except BaseException:
            channel.close()
            raise
        finally:
            if probe is not None:
                probe.close()
        self._channel, self._location, self._methods = channel, location, answer["methods"]

    def _accepted(self, frame: wire.Frame, channel: Channel, location: Location) -> dict[str, Any]:
        if frame.type == message.MSG_CONNECTFAIL:
            raise TransportError(f"{location} refuses the connection: {wire.read_literal(frame)}")
        if frame.type != message.MSG_CONNECTOK or frame.serializer != wire.SERIALIZER_ID:
            raise MalformedMessage("it answers in another protocol")
        answer = channel.decode(frame.data, copy=True)
        if not isinstance(answer, dict) or set(answer) != {"version", "token", "max_message_bytes", "methods"}:
            raise MalformedMessage("its handshake has other fields")
        if answer["version"] != wire.PROTOCOL_VERSION:
            raise TransportError(
                f"{location} speaks version {answer['version']} of the protocol, this client {wire.PROTOCOL_VERSION}; "
                "use the shm_transport folder of the same release on both sides"
            )
        methods, limit = answer["methods"], answer["max_message_bytes"]
        if not isinstance(methods, list) or type(limit) is not int or not 0 < limit < 1 << 31:
            raise MalformedMessage("its handshake has fields of other types")
        return answer

    def _disconnect(self) -> None:
        if self._channel is None or self._pid != os.getpid():
            return
        channel, self._channel = self._channel, None
        channel.close()
        reclaim_stale()  # if the service was killed, nobody else may


def _is_reply(tree: Any) -> bool:
    """Whether it is (result, timing)."""
    if not isinstance(tree, tuple) or len(tree) != 2 or not isinstance(tree[1], dict):
        return False
    return "total" in tree[1] and all(type(seconds) is float for seconds in tree[1].values())


def ping(proxy: ShmProxy, payload: Any = None) -> float:
    """Seconds that a call takes which carries ``payload`` there and does nothing. Raises TransportError as calls do."""
    started = time.perf_counter()
    proxy._call(wire.PING, payload)
    return time.perf_counter() - started


def connection_info(proxy: ShmProxy) -> dict[str, Any]:
    """How a proxy is connected: {"connected", "location", "methods", "shared_memory", "segments_created",
    "sent_bytes", "received_bytes"}, the last three counted since the session began."""
    with proxy._lock:
        channel = proxy._channel
        return {
            "connected": channel is not None,
            "location": str(proxy._location),
            "methods": list(proxy._methods),
            "shared_memory": channel is not None and channel.shared,
            "segments_created": channel.segments_created if channel is not None else 0,
            "sent_bytes": channel.sent_bytes if channel is not None else 0,
            "received_bytes": channel.received_bytes if channel is not None else 0,
        }


@atexit.register
def _close_all() -> None:
    for proxy in list(_open_proxies):
        proxy.close()
