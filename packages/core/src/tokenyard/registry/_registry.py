"""The registry: all backends of the installed plugins, by kind and name."""

from __future__ import annotations

import functools
from collections.abc import Iterable

import pluggy

from tokenyard import hookspecs
from tokenyard.backend import KINDS, Kind
from tokenyard.errors import BackendError
from tokenyard.registry._choose import (
    BackendChoice,
    Request,
    choose,
    overridden,
    parse_request,
    variable,
)
from tokenyard.registry._discover import Plugin, Problem, installed_plugins
from tokenyard.registry._offers import Offer
from tokenyard.workload import Workload

HOOKS: dict[Kind, str] = {
    "router": "tokenyard_routers",
    "permutation": "tokenyard_permutations",
    "experts": "tokenyard_experts",
    "exchange": "tokenyard_exchanges",
    "strategy": "tokenyard_strategies",
    "model": "tokenyard_models",
}


class Registry:
    """The backends of some plugins. Raises BackendError if two plugins offer the same name."""

    def __init__(self, plugins: Iterable[Plugin], problems: Iterable[Problem] = ()):
        self.problems: list[Problem] = list(problems)  # plugins that could not be loaded
        self._offers: dict[Kind, dict[str, Offer]] = {kind: {} for kind in KINDS}
        for plugin in plugins:
            self._add(plugin)

    def offers(self, kind: Kind) -> list[Offer]:
        """Return the offers of one kind, highest priority first."""
        return sorted(
            self._offers[kind].values(), key=lambda o: (-o.backend.priority, o.backend.name)
        )

    def choose(
        self, kind: Kind, request: Request = None, workload: Workload | None = None
    ) -> BackendChoice:
        """Choose a backend: ``$TOKENYARD_<KIND>`` overrides `request`; the default is "auto".

        `request` is a name, "auto", or a mapping with `name` and options. A named backend has no
        fallback. "auto" chooses the usable backend of highest priority. Raises BackendError with
        the request, the reason, and what would work.
        """
        name, options = parse_request(kind, request)
        try:
            return choose(kind, name, options, self.offers(kind), self.problems, workload)
        except BackendError as error:
            if name != overridden(kind):
                raise
            raise BackendError(f"{error} (set by {variable(kind)})") from None

    def _add(self, plugin: Plugin) -> None:
        manager = pluggy.PluginManager("tokenyard")
        manager.add_hookspecs(hookspecs)
        manager.register(plugin.module)
        for kind, hook in HOOKS.items():
            try:
                offered = getattr(manager.hook, hook)()
                backends = [backend for group in offered for backend in group]
            except Exception as error:
                reason = (
                    f"{plugin.distribution} {plugin.version} failed in its hook {hook}: {error!r}"
                )
                self.problems.append(Problem(plugin.distribution, reason))
                continue
            for backend in backends:
                self._insert(Offer(kind, backend, plugin.distribution, plugin.version))

    def _insert(self, offer: Offer) -> None:
        name = offer.backend.name
        other = self._offers[offer.kind].setdefault(name, offer)
        if other is not offer:
            raise BackendError(
                f"{offer.kind} backend {name!r} is offered by both "
                f"{other.distribution} {other.version} and {offer.distribution} {offer.version}; "
                "uninstall one of them"
            )


@functools.cache
def default_registry() -> Registry:
    """Return the registry of all installed plugins. It is built once per process."""
    return Registry(*installed_plugins())
