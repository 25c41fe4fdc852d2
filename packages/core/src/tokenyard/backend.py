"""A backend: a named implementation of one of tokenyard's interfaces."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from tokenyard.errors import BackendError
from tokenyard.foreign import attempt
from tokenyard.workload import Workload

Kind = Literal["router", "permutation", "experts", "exchange", "strategy", "model"]
"""The interface that a backend implements."""

KINDS: tuple[Kind, ...] = ("router", "permutation", "experts", "exchange", "strategy", "model")
"""All kinds of backends. The hook of a kind is ``tokenyard_<kind>s``, or ``tokenyard_experts``."""


def _always(workload: Workload) -> str | None:
    return None


@dataclass(frozen=True)
class Backend:
    """A plugin's offer: a name for configs, the class, and when it is usable.

    The class is imported only when the backend is chosen. Its constructor depends on the kind:

    * routers and permutations: ``cls(workload, **options)``
    * expert kernels: ``cls(workload, permutation, **options)``
    * exchanges: ``cls(workload, permutation, group, **options)``
    * strategies: ``cls(device=..., **options)``
    * models: see ``tokenyard.Model``
    """

    name: str  # in configs
    path: str  # "package.module:Class"
    priority: int = 0  # "auto" takes the highest usable one; a reference has 0, an oracle less
    unusable: Callable[[Workload], str | None] = _always  # None, or one sentence with the reason
    algorithm: str | None = None  # of a router: it is unusable for another `RoutingRule.algorithm`
    any_width: bool = False  # of experts: it is usable for a workload with `ffn_dims`

    def load(self) -> Any:
        """Import the class. Raises BackendError, which names the path, if that fails."""
        module, _, name = self.path.partition(":")
        loaded, fault = attempt(lambda: getattr(importlib.import_module(module), name))
        if fault is not None:
            raise BackendError(
                f"backend {self.name!r} could not be loaded from {self.path}: {fault}"
            )
        return loaded
