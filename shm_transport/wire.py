"""Messages on a socket, in Pyro4's frame: its 24-byte header, then a payload that only this package reads.

The frame is Pyro4's so that its daemon, its ping and its proxies recognise one another's messages and refuse what they
do not accept by name. Pyro4's serialisers are not used: a payload is a prelude (the shared segment that its arrays lie
in) and a tree as ``tree_format`` describes it, marked by a serialiser number of our own.
"""

from __future__ import annotations

import select
import socket
import struct
import time
from typing import Any, NamedTuple

import numpy as np
import serpent
from Pyro4 import constants, message, socketutil
from Pyro4.configuration import config

from .errors import MalformedMessage

#: of the handshake and everything behind it; a peer with another one is refused
PROTOCOL_VERSION = 2
SERIALIZER_ID = 0x4150
SERPENT_ID = 1
#: a method of every service, which takes anything and returns None
PING = "_ping"
#: bytes of one message with its arrays, unless the server is told otherwise
MAX_MESSAGE_BYTES = 1 << 28
#: a peer that began a message must complete it within so many seconds
BODY_TIMEOUT_S = 30.0
#: a client looks for its reply for so long before it sleeps, and a server for the call that follows upon another (a
#: frame, then a query): less than 1% of a core at a robot's rates
SPIN_S = 200e-6

_HEADER = struct.Struct(message.Message.header_format)
_JOIN_BELOW = 1 << 16
_RECV_AT_ONCE = 1 << 16
_MAX_PARTS = 512  # the kernel takes 1024 buffers at once


class PeerGone(Exception):
    """The other side closed the connection, or it broke."""


class TimedOut(Exception):
    """The deadline passed."""


class Frame(NamedTuple):
    """One message. ``data``: bytes, or a read-only memoryview for a long one."""

    type: int
    flags: int
    seq: int
    serializer: int
    data: Any


#: ends what is said of a peer that breaks off or does not make itself understood
TLS_HINT = "(Or only one side uses TLS: PYRO_SSL must be the same on both)"


def connect(host: str, port: int, timeout: float) -> socket.socket:
    """A connected TCP socket (with TLS if Pyro4 is configured for it). Raises OSError."""
    sock = socket.create_connection((host, port), timeout=timeout)
    if config.SSL:
        context = socketutil.getSSLcontext(
            clientcert=config.SSL_CLIENTCERT,
            clientkey=config.SSL_CLIENTKEY,
            keypassword=config.SSL_CLIENTKEYPASSWD,
            cacerts=config.SSL_CACERTS,
        )
        sock = context.wrap_socket(sock, server_side=False, server_hostname=host)
    return sock


def tune(sock: socket.socket) -> None:
    """Send at once, and notice a peer whose machine vanished."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, name):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


class Stream:
    """Messages in and out over one connected socket, for one thread at a time."""

    def __init__(self, sock: socket.socket, patience: float):
        """``patience``: how many seconds a wait usually may take; other deadlines are kept at the cost of a system
        call each."""
        self.sock = sock
        self._patience = patience
        sock.settimeout(patience)
        self._rest = b""  # received beyond the last message
        tune(sock)

    def close(self) -> None:
        """Close the socket."""
        self.sock.close()

    def send(
        self,
        kind: int,
        parts: list[Any],
        deadline: float,
        seq: int = 0,
        flags: int = 0,
        serializer: int = SERIALIZER_ID,
    ) -> None:
        """Send one message made of ``parts`` by the deadline (of ``time.monotonic``). Raises PeerGone or TimedOut."""
        size = sum(map(len, parts))
        if size >= 1 << 31:
            raise ValueError(f"a message of {size} bytes; Pyro4's frame ends at 2 GiB")
        checksum = kind + constants.PROTOCOL_VERSION + size + serializer + flags + seq + message.Message.checksum_magic
        header = _HEADER.pack(
            b"PYRO", constants.PROTOCOL_VERSION, kind, flags, seq, size, serializer, 0, 0, checksum & 0xFFFF
        )
        try:
            self._wait_until(deadline)
            if size < _JOIN_BELOW or not hasattr(self.sock, "sendmsg"):
                self.sock.sendall(b"".join([header, *parts]))
            else:
                self._send_gathered([memoryview(part) for part in (header, *parts) if len(part)], deadline)
        except socket.timeout:
            raise TimedOut from None
        except OSError as error:
            raise PeerGone(str(error)) from None

    def _send_gathered(self, views: list[memoryview], deadline: float) -> None:
        """Send without joining: large arrays go from where they lie."""
        first = 0
        while first < len(views):
            self._wait_until(deadline)
            try:
                sent = self.sock.sendmsg(views[first : first + _MAX_PARTS])
            except NotImplementedError:  # TLS sockets have the method but refuse it
                self.sock.sendall(b"".join(views[first:]))
                return
            while sent:
                if sent >= len(views[first]):
                    sent -= len(views[first])
                    first += 1
                else:
                    views[first] = views[first][sent:]
                    sent = 0

    def spin(self, seconds: float) -> None:
        """Look for the next message without sleeping: one that comes at once is then not kept waiting for this process
        to be woken, which takes longer than such a message does."""
        if hasattr(select, "poll"):
            poll = select.poll()
            poll.register(self.sock, select.POLLIN)
            until = time.perf_counter() + seconds
            while not poll.poll(0) and time.perf_counter() < until:
                pass

    def receive(self, max_bytes: int, deadline: float | None = None, body_s: float = BODY_TIMEOUT_S) -> Frame:
        """The next message. Waits for it until the deadline (None: for ever), and for its rest ``body_s`` at most.

        Raises PeerGone, TimedOut, or MalformedMessage for what is not a Pyro4 frame or is longer than ``max_bytes``,
        upon which the connection is of no more use."""
        try:
            data = self._rest
            if len(data) < _HEADER.size:
                data = self._begin(data, deadline)
                body = time.monotonic() + body_s
                deadline = body if deadline is None else min(deadline, body)
                while len(data) < _HEADER.size:
                    data += self._more(_RECV_AT_ONCE, deadline)
            elif deadline is None:
                deadline = time.monotonic() + body_s
            kind, flags, seq, size, serializer, annotations = _parse_header(data)
            if size > max_bytes:
                raise MalformedMessage(f"a message of {size} bytes; at most {max_bytes} are accepted")
            start = _HEADER.size + annotations  # an ordinary Pyro4 peer's; nothing here needs them
            while len(data) < start:
                data += self._more(start - len(data), deadline)
            end = start + size
            if len(data) >= end:
                self._rest = data[end:]
                return Frame(kind, flags, seq, serializer, data[start:end])
            self._rest = b""
            return Frame(kind, flags, seq, serializer, self._complete(data[start:], size, deadline))
        except socket.timeout:
            raise TimedOut from None
        except OSError as error:
            raise PeerGone(str(error)) from None

    def _begin(self, data: bytes, deadline: float | None) -> bytes:
        """Wait for a message to begin. A short one arrives whole."""
        while True:
            try:
                return data + self._more(_RECV_AT_ONCE, deadline)
            except socket.timeout:
                if deadline is not None:
                    raise

    def _more(self, size: int, deadline: float | None) -> bytes:
        if deadline is not None:
            self._wait_until(deadline)
        data = self.sock.recv(size)
        if not data:
            raise PeerGone("closed by the other side")
        return data

    def _complete(self, data: bytes, size: int, deadline: float) -> memoryview:
        """The rest of a long payload. Memory that numpy has not touched is not yet taken, so that a header which
        promises much costs nothing."""
        whole = np.empty(size, np.uint8)
        view = memoryview(whole)
        view[: len(data)] = data
        at = len(data)
        while at < size:
            self._wait_until(deadline)
            count = self.sock.recv_into(view[at:])
            if count == 0:
                raise PeerGone("closed by the other side in the middle of a message")
            at += count
        return view.toreadonly()

    def _wait_until(self, deadline: float) -> None:
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimedOut
        if abs(left - self._patience) > 0.05 * self._patience:
            self._patience = left
            self.sock.settimeout(left)


def _parse_header(data: bytes) -> tuple[int, int, int, int, int, int]:
    """Message type, flags, sequence number, payload bytes, serialiser and bytes of annotations."""
    tag, version, kind, flags, seq, size, serializer, annotations, _, checksum = _HEADER.unpack_from(data)
    if tag != b"PYRO" or version != constants.PROTOCOL_VERSION:
        raise MalformedMessage("not a Pyro4 message")
    total = kind + version + size + annotations + flags + serializer + seq + message.Message.checksum_magic
    if checksum != total & 0xFFFF or size < 0:
        raise MalformedMessage("a Pyro4 header whose checksum is wrong")
    return kind, flags, seq, size, serializer, annotations


def peer_closed(sock: socket.socket) -> bool:
    """Whether the other side has gone, without reading what it may have sent. Known on Linux; elsewhere False."""
    if not hasattr(select, "POLLRDHUP"):
        return False
    poll = select.poll()
    try:
        poll.register(sock, select.POLLRDHUP)
    except ValueError:  # closed on this side
        return True
    return bool(poll.poll(0))


def text_payload(text: str) -> bytes:
    """A text that ordinary Pyro4 peers can read too: refusals are sent so."""
    return serpent.dumps(text)


def read_literal(frame: Frame) -> Any:
    """What a serpent payload says: plain Python literals, never objects."""
    if frame.serializer != SERPENT_ID:
        raise MalformedMessage(f"a payload in serialiser {frame.serializer}; only serpent ({SERPENT_ID}) is read here")
    if len(frame.data) > 1 << 20:
        raise MalformedMessage(f"a text payload of {len(frame.data)} bytes")
    try:
        return serpent.loads(bytes(frame.data))
    except Exception as error:  # whatever the parser makes of hostile text
        raise MalformedMessage(f"a payload that is not serpent ({type(error).__name__})") from None
