"""Load the class of a backend, and check that it has the methods of its kind."""

from __future__ import annotations

import inspect
from typing import Any

from tokenyard.backend import Backend, Kind
from tokenyard.errors import BackendError
from tokenyard.interfaces import Exchange, ExpertKernel, Permutation, Router, Strategy

_INTERFACES: dict[Kind, type] = {
    "router": Router,
    "permutation": Permutation,
    "experts": ExpertKernel,
    "exchange": Exchange,
    "strategy": Strategy,
}
"""The interface of each kind. See `tokenyard.model.missing_part` for models."""


def _methods(kind: Kind) -> list[str]:
    """Return the methods that a backend of a kind must have."""
    members = vars(_INTERFACES[kind]) if kind in _INTERFACES else {}
    return [
        name
        for name, member in members.items()
        if inspect.isfunction(member) and (name == "__call__" or not name.startswith("_"))
    ]


def load_class(kind: Kind, backend: Backend) -> Any:
    """Import the class of a backend. Raises BackendError for something else than such a class."""
    cls = backend.load()
    if not isinstance(cls, type):
        kind_of = type(cls).__name__
        raise BackendError(
            f"backend {backend.name!r}: {backend.path} is not a class but a {kind_of}"
        )
    # Every class is callable, so `hasattr` would find `__call__` in its metaclass.
    defined = {name for base in cls.__mro__ for name in vars(base)}
    missing = [name for name in _methods(kind) if name not in defined]
    if missing:
        raise BackendError(
            f"backend {backend.name!r}: {backend.path} is not a backend of the kind {kind}; "
            f"it lacks {', '.join(missing)}"
        )
    return cls
