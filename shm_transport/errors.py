"""What can go wrong between a client and its service, by name.

``TransportError`` and its kinds mean that the connection failed; ``RemoteError`` means that the service received the
call and its method raised. A remote error is also an instance of the built-in type that was raised over there, so that
``except ValueError`` works alike with a local and a remote object.
"""

from __future__ import annotations


class TransportError(Exception):
    """The service cannot be reached or does not speak this protocol; the message says what to do."""


class SessionLost(TransportError):
    """The connection broke while a session was open. What the service knew about this client (its prompt, its frames
    and its settings) is gone; the next call opens a new session."""


class CallTimeout(SessionLost, TimeoutError):
    """No reply within the proxy's timeout. The session is given up, as a late reply could not be told apart."""


class MalformedMessage(ValueError):
    """Bytes from the peer that are not a message of this protocol, or one that contradicts itself."""


class Unsendable(TypeError):
    """A value that cannot travel; ``path`` says where in the tree it is."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason
        self.path: list[str] = []

    def __str__(self) -> str:
        return "".join(reversed(self.path)) + ": " + self.reason if self.path else self.reason


class RemoteError(Exception):
    """The service's method raised. ``str`` of it is the remote message."""

    #: type over there, with its module unless built in: "ValueError", "torch.OutOfMemoryError"
    remote_type = "Exception"
    #: the service's traceback as text
    remote_traceback = ""

    def __init__(self, message: str, remote_type: str = "Exception", remote_traceback: str = ""):
        super().__init__(message)
        self.message = message
        self.remote_type = remote_type
        self.remote_traceback = remote_traceback

    def __str__(self) -> str:
        return self.message  # KeyError would show its repr


# Built-in types that may be mirrored. Nothing else that a peer names is ever looked up.
_MIRRORED: tuple[type[Exception], ...] = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    BufferError,
    FileNotFoundError,
    ImportError,
    IndexError,
    KeyError,
    LookupError,
    MemoryError,
    NotImplementedError,
    OSError,
    OverflowError,
    PermissionError,
    RuntimeError,
    TimeoutError,
    TypeError,
    ValueError,
    ZeroDivisionError,
)
_MAX_TEXT = 1 << 16
_REMOTE_TYPES: dict[str, type[RemoteError]] = {
    kind.__name__: type("Remote" + kind.__name__, (RemoteError, kind), {"__module__": __name__}) for kind in _MIRRORED
}


def describe_exception(error: BaseException, traceback_text: str) -> dict[str, object]:
    """What travels of an exception: its type's name, the built-in types it derives from, message and traceback."""
    kind = type(error)
    name = kind.__qualname__ if kind.__module__ == "builtins" else kind.__module__ + "." + kind.__qualname__
    message = error.args[0] if isinstance(error, KeyError) and len(error.args) == 1 else error
    bases: list[str] = [base.__name__ for base in kind.__mro__ if base.__module__ == "builtins"]
    return {
        "type": name,
        "bases": bases,
        "message": str(message)[:_MAX_TEXT],
        "traceback": traceback_text[-_MAX_TEXT:],  # its end is what matters
    }


def rebuild_exception(described: object) -> Exception:
    """The ``RemoteError`` for what ``describe_exception`` made; a ``MalformedMessage`` where it is something else."""
    if not isinstance(described, dict) or set(described) != {"type", "bases", "message", "traceback"}:
        return MalformedMessage("the service reported an error in a form that this client does not know")
    texts = [described[key] for key in ("message", "type", "traceback")]
    bases = described["bases"]
    if not all(isinstance(text, str) for text in texts) or not isinstance(bases, list):
        return MalformedMessage("the service reported an error in a form that this client does not know")
    for base in bases:
        kind = _REMOTE_TYPES.get(base) if isinstance(base, str) else None
        if kind is not None:
            return kind(*texts)
    return RemoteError(*texts)
