"""The architectures of the action expert, by the name that ``arch`` has in a configuration."""

from __future__ import annotations

import pkgutil
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from apt.model.experts.expert import Expert

#: name -> ``module:class``; a module is imported where its architecture is used
ARCHITECTURES = {
    "apt": "apt.model.experts.apt:ActionExpert",
    "pi": "apt.model.experts.pi:PiExpert",
    "gr00t": "apt.model.experts.gr00t:GR00TExpert",
    "token_insertion": "apt.model.experts.token_insertion:TokenInsertionExpert",
}


def check_architecture(name: str) -> None:
    """Raise ``ValueError`` for a name that is not registered."""
    if name not in ARCHITECTURES:
        raise ValueError(f"unknown arch {name!r}; choose from {', '.join(ARCHITECTURES)}")


def get_architecture(name: str) -> type[Expert]:
    """The class of an architecture. Raises ``ValueError`` for an unknown name."""
    check_architecture(name)
    return pkgutil.resolve_name(ARCHITECTURES[name])
