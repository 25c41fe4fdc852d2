"""A backend: a named implementation of one of tokenyard's interfaces."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from tokenyard.errors import BackendError
from tokenyard.workload import Workload

Kind = Literal["router", "permutation", "experts", "exchange", "strategy", "model"]
"""What a backend is an implementation of."""

KINDS: tuple[Kind, ...] = ("router", "permutation", "experts", "exchange", "strategy", "model")
"""What can be replaced by a plugin; each has the hook ``tokenyard_<kind>s`` (``tokenyard_experts``)."""


def _always(workload: Workload) -> str | None:
    return None


@dataclass(frozen=True)
class Backend:
    """What a plugin offers: a name for config, where the class is, and when it can be used.

    The class is imported only when the backend is chosen. How it is constructed depends on the kind: routers and
    permutations as ``cls(workload, **options)``; expert kernels ``cls(workload, permutation, **options)``; exchanges
    ``cls(workload, permutation, group, **options)``; strategies ``cls(device=..., **options)``; models
    ``cls(config, backends=..., device=..., dtype=...)``.
    """

    name: str  # what config says
    path: str  # "package.module:Class"
    priority: int = 0  # "auto" takes the highest usable one; a reference has 0, an oracle less
    unusable: Callable[[Workload], str | None] = _always  # None, or one sentence that says why not

    def load(self) -> Any:
        """Import the class; raises BackendError naming the path if that fails."""
        module, _, name = self.path.partition(":")
        try:
            return getattr(importlib.import_module(module), name)
        except Exception as error:
            raise BackendError(
                f"backend {self.name!r} could not be loaded from {self.path}: {error!r}"
            ) from error
