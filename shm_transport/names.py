"""The Pyro4 name server (``pyro4-ns -p 9091``), as seen from here: which service is where.

Asked in serpent with Pyro4's own messages. Pyro4's proxy is not used, as it reads a reply in whatever serialiser the
reply claims to be in, pickle included, and has no timeout of its own.
"""

from __future__ import annotations

import socket
import time
from typing import Any, NamedTuple

import serpent
from Pyro4 import constants, errors, message
from Pyro4.core import URI

from . import wire
from .errors import MalformedMessage, TransportError

DEFAULT_PORT = 9091
_MAX_REPLY = 1 << 20


class NoNameServer(TransportError):
    """No name server answers."""


class UnknownName(TransportError):
    """The name server does not know the name."""


class Location(NamedTuple):
    """Where a service listens: Pyro4's object id, host and port."""

    object: str
    host: str
    port: int

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"PYRO:{self.object}@{host}:{self.port}"


class NameServer:
    """A name server at ``host:port``. Every question is a connection of its own, with ``timeout`` seconds for all of
    it, and raises NoNameServer if nobody answers."""

    def __init__(self, host: str = "localhost", port: int = DEFAULT_PORT, timeout: float = 5.0):
        self.host, self.port = host, port
        self._timeout = timeout

    def lookup(self, name: str) -> Location:
        """Where the service of this name is. Raises UnknownName."""
        answer = self._ask("lookup", name)
        state = answer.get("state") if isinstance(answer, dict) else None
        if isinstance(state, (tuple, list)) and len(state) == 5:
            protocol, object_id, sockname, host, port = state
            if protocol == "PYRO" and not sockname and isinstance(object_id, str) and isinstance(host, str):
                if isinstance(port, int) and 0 < port < 1 << 16:
                    return Location(object_id, host, port)
        raise TransportError(f"the name server at {self} gives no usable address for {name!r}: {str(answer)[:200]}")

    def find(self, name: str) -> Location | None:
        """As lookup, or None."""
        try:
            return self.lookup(name)
        except UnknownName:
            return None

    def register(self, name: str, location: Location) -> None:
        """Say where a service is, in place of what was said before."""
        self._ask("register", name, str(location))

    def remove(self, name: str) -> None:
        """Forget a name."""
        self._ask("remove", name)

    def names(self) -> dict[str, str]:
        """All names, with their addresses as text."""
        answer = self._ask("list")
        if not isinstance(answer, dict):
            raise TransportError(f"the name server at {self} gives no list of names: {str(answer)[:200]}")
        return {str(name): str(uri) for name, uri in answer.items() if name != constants.NAMESERVER_NAME}

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"

    def _ask(self, method: str, *arguments: str) -> Any:
        deadline = time.monotonic() + self._timeout
        try:
            with wire.connect(self.host, self.port, self._timeout) as sock:
                stream = wire.Stream(sock, self._timeout)
                self._exchange(stream, message.MSG_CONNECT, {"handshake": "hello"}, deadline)
                call = (constants.NAMESERVER_NAME, method, arguments, {})
                frame = self._exchange(stream, message.MSG_INVOKE, call, deadline)
        except (OSError, wire.PeerGone, wire.TimedOut, MalformedMessage) as error:
            reason = "no answer in time" if isinstance(error, (wire.TimedOut, socket.timeout)) else str(error)
            raise NoNameServer(
                f"no name server at {self} ({reason}); start one with: pyro4-ns -p {self.port}, or give the host and "
                f"port of the one that runs. {wire.TLS_HINT}"
            ) from None
        try:
            answer = wire.read_literal(frame)
        except MalformedMessage as error:
            raise TransportError(f"the name server at {self} answers with {error}") from None
        if frame.flags & message.FLAGS_EXCEPTION:
            text = " ".join(str(part) for part in answer.get("args", ())) if isinstance(answer, dict) else str(answer)
            if "unknown name" in text:
                raise UnknownName(
                    f"the name server at {self} knows no {arguments[0]!r}; start the service, or wait until "
                    f"it prints ready; for the names there are, ask pyro4-nsc -p {self.port} list"
                )
            raise TransportError(f"the name server at {self} refuses {method}: {text[:500]}")
        return answer

    def _exchange(self, stream: wire.Stream, kind: int, content: Any, deadline: float) -> wire.Frame:
        stream.send(kind, [serpent.dumps(content)], deadline, serializer=wire.SERPENT_ID)
        frame = stream.receive(_MAX_REPLY, deadline)
        if frame.type == message.MSG_CONNECTFAIL:
            raise MalformedMessage(f"it refuses connections: {bytes(frame.data[:200])!r}")
        return frame


def parse_uri(text: str) -> Location:
    """``PYRO:object@host:port`` as a location."""
    try:
        uri = URI(text)
    except errors.PyroError as error:
        raise TransportError(f"{text!r} is no address of a service ({error}); wanted PYRO:object@host:port") from None
    if uri.protocol != "PYRO" or not uri.host:
        raise TransportError(f"{text!r} is no address of a service; wanted PYRO:object@host:port")
    return Location(uri.object, uri.host, uri.port)
