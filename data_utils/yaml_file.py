"""YAML files that people write, as dataclasses; whatever is wrong in them is said with file and line."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml


class Wrong(ValueError):
    """What is wrong with a field, or with a ``key`` in it; where it is is added on the way out."""

    def __init__(self, what: str, where: str = "", key: str = "") -> None:
        super().__init__(f"{where}: {what}" if where else what)
        self.what, self.where, self.key = what, where, key

    @property
    def place(self) -> str:
        return f"{self.where}.{self.key}".strip(".")


class _Loader(yaml.SafeLoader):
    """Refuses a key that is there twice, of which YAML's rules let libraries take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue  # what is merged in may be said anew
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, (str, int, float, bool)) and key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key!r} is there twice", key_node.start_mark)
            if isinstance(key, (str, int, float, bool)):
                seen.add(key)
        return super().construct_mapping(node, deep)


@dataclass(frozen=True)
class YamlFile:
    """What a file holds, and where."""

    path: Path
    value: object
    _lines: dict[str, int]

    def at(self, where: str) -> str:
        """File and line of a place such as ``cameras.front.size[0]``, or of the closest around it that is there."""
        while where and where not in self._lines:
            where = where[: max(where.rfind("."), where.rfind("["), 0)]
        return f"{self.path}, line {self._lines[where]}" if where in self._lines else str(self.path)

    def build(self, cls: type) -> Any:
        """An instance of the dataclass ``cls``; see :func:`build`. Raises ``ValueError`` with file and line."""
        try:
            return build(cls, self.value)
        except Wrong as error:
            raise ValueError(f"{self.at(error.place)}: {error}") from error


def read_yaml(path: Path) -> YamlFile:
    """Raises ``ValueError`` with file and line for one that is no YAML, or that says something twice; ``OSError``."""
    loader = None
    try:
        loader = _Loader(path.read_text(encoding="utf-8"))
        node = loader.get_single_node()
        lines: dict[str, int] = {}
        if node is None:
            return YamlFile(path, None, lines)
        value = loader.construct_document(node)
        _note_lines(node, "", lines, ())
        return YamlFile(path, value, lines)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: is not valid YAML (byte {error.start} is no UTF-8)") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = "" if mark is None else f", line {mark.line + 1}"
        raise ValueError(f"{path}{line}: is not valid YAML ({error.problem or error.context})") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # a date of month 13, a list that holds itself
        raise ValueError(f"{path}: is not valid YAML ({' '.join(str(error).split())})") from error
    finally:
        if loader is not None:
            loader.dispose()


def _note_lines(node: yaml.Node, where: str, lines: dict[str, int], around: tuple[yaml.Node, ...]) -> None:
    lines.setdefault(where, node.start_mark.line + 1)
    if node in around:
        return  # an alias of what it lies in
    if isinstance(node, yaml.MappingNode):
        for key, item in node.value:
            name = f"{where}.{key.value}".lstrip(".") if isinstance(key, yaml.ScalarNode) else where
            lines[name] = key.start_mark.line + 1
            _note_lines(item, name, lines, (*around, node))
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            _note_lines(item, f"{where}[{index}]", lines, (*around, node))


def build(cls: type, raw: object) -> Any:
    """An instance of the dataclass ``cls`` from a mapping of exactly its fields, with dataclasses in it.

    A type with a class method ``read`` makes itself of a value. Raises :class:`Wrong`, also where a constructor raises
    ``ValueError``.
    """
    known = field_names(cls)
    if not isinstance(raw, dict):
        raise Wrong(f"is {raw!r}; wanted a mapping with {', '.join(known)}")
    if unknown := [str(name) for name in raw if name not in known]:
        raise Wrong(f"has unknown field {unknown[0]!r}; known: {', '.join(known)}", key=unknown[0])
    without = (dataclasses.MISSING, dataclasses.MISSING)
    missing = [n for n, field in known.items() if n not in raw and (field.default, field.default_factory) == without]
    if missing:
        raise Wrong(f"lacks field {missing[0]!r}")
    hints = typing.get_type_hints(cls)
    values = {name: _at(name, lambda name=name: _convert(hints[name], raw[name])) for name in raw}
    try:
        return cls(**values)
    except Wrong:
        raise
    except ValueError as error:
        raise Wrong(str(error)) from error


def field_names(cls: type) -> dict[str, dataclasses.Field]:
    return {field.name: field for field in dataclasses.fields(cls)}


def _convert(hint: Any, raw: object) -> Any:
    """``raw`` as the type ``hint``."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        if raw is None:
            return None
        hint = next(item for item in typing.get_args(hint) if item is not type(None))
    if hint is object:
        return raw
    if hasattr(hint, "read"):
        return hint.read(raw)
    if dataclasses.is_dataclass(hint):
        return build(hint, raw)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is tuple:
        length = None if arguments[-1] is Ellipsis else len(arguments)
        if not isinstance(raw, list) or length not in (None, len(raw)):
            raise Wrong(f"is {raw!r}; wanted a list" + ("" if length is None else f" of {length}"))
        item = arguments[0]
        return tuple(_at(f"[{index}]", lambda value=value: _convert(item, value)) for index, value in enumerate(raw))
    if origin is dict:
        if not isinstance(raw, dict):
            raise Wrong(f"is {raw!r}; wanted a mapping")
        item = arguments[1]
        return {str(key): _at(str(key), lambda value=value: _convert(item, value)) for key, value in raw.items()}
    wanted = (int, float) if hint is float else hint
    if not isinstance(raw, wanted) or (hint is bool) != isinstance(raw, bool):
        raise Wrong(f"is {raw!r}; wanted {_NAMES.get(hint, hint.__name__)}")
    if hint is float and not math.isfinite(raw):
        raise Wrong(f"is {raw!r}; wanted a finite number")
    return hint(raw)


_NAMES = {float: "a finite number", int: "a whole number", str: "text", bool: "true or false"}


def _at(name: str, convert: Callable[[], Any]) -> Any:
    try:
        return convert()
    except Wrong as error:
        joint = "." if error.where and not error.where.startswith("[") else ""
        raise Wrong(error.what, f"{name}{joint}{error.where}", error.key) from None
