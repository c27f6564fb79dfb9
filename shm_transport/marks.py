"""Marks: which methods may be called from afar, and which dataclasses may travel."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any, Callable

_EXPOSED = "_shm_transport_exposed"
_CLASSES: dict[str, type[Any]] = {}


def expose(method_or_class: Any) -> Any:
    """Mark a method, or all public methods of a class, as callable by clients. Names that start with an underscore
    cannot be exposed."""
    if inspect.isclass(method_or_class):
        for name, member in vars(method_or_class).items():
            if inspect.isfunction(member) and not name.startswith("_"):
                setattr(member, _EXPOSED, True)
        return method_or_class
    if not inspect.isfunction(method_or_class):
        raise TypeError(f"@expose marks functions and classes, not {method_or_class!r}; put it under @classmethod")
    if method_or_class.__name__.startswith("_"):
        raise ValueError(f"{method_or_class.__name__} is private: @expose marks public names only")
    setattr(method_or_class, _EXPOSED, True)
    return method_or_class


def exposed_methods(session: object) -> dict[str, Callable[..., Any]]:
    """The session's callable methods by name."""
    methods = {}
    for name in dir(type(session)):
        if not name.startswith("_"):
            member = inspect.getattr_static(type(session), name)
            member = getattr(member, "__func__", member)  # a classmethod or staticmethod
            if getattr(member, _EXPOSED, False):
                methods[name] = getattr(session, name)
    return methods


def dive_into(cls: type[Any]) -> type[Any]:
    """Mark a dataclass as one that travels: its fields go one by one, and it arrives as the same dataclass, which both
    sides must have marked. It is known by its bare name, and built by its constructor, so its ``__post_init__`` runs
    again at the other end."""
    if not dataclasses.is_dataclass(cls) or not inspect.isclass(cls):
        raise TypeError(f"dive_into marks dataclasses, not {cls!r}; add @dataclass under it")
    known = _CLASSES.get(cls.__name__)
    if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
        raise ValueError(
            f"two dataclasses named {cls.__name__} would travel, from {known.__module__} and {cls.__module__}"
        )
    _CLASSES[cls.__name__] = cls
    return cls


def travelling_class(name: str) -> "type[Any] | None":
    """The class marked under this name, or None."""
    return _CLASSES.get(name)


def init_fields(cls: type[Any]) -> tuple[str, ...]:
    """The fields that a marked dataclass is built from."""
    return tuple(field.name for field in dataclasses.fields(cls) if field.init)
