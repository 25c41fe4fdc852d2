"""The registry: all backends of the installed plugins, by kind and name."""

from __future__ import annotations

import functools
from collections.abc import Iterable

import pluggy

from tokenyard import hookspecs
from tokenyard.backend import KINDS, Backend, Kind
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


_OURS = "tokenyard-"
_EXPECTED = "an offer is a tokenyard.Backend with texts as its name and path"


class Registry:
    """The backends of some plugins. What a broken plugin offers is in `problems`."""

    def __init__(self, plugins: Iterable[Plugin], problems: Iterable[Problem] = ()):
        self.problems: list[Problem] = list(problems)  # plugins that could not be loaded
        self._offers: dict[Kind, dict[str, Offer]] = {kind: {} for kind in KINDS}
        self._contested: dict[Kind, dict[str, Offer]] = {kind: {} for kind in KINDS}
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
        origin = f"{plugin.distribution} {plugin.version}"
        try:
            manager.register(plugin.module)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # a broken plugin may raise anything
            self._report(plugin, f"{origin} cannot be registered: {error!r}")
            return
        for kind, hook in HOOKS.items():
            try:
                offered = getattr(manager.hook, hook)()
                backends = [backend for group in offered for backend in group]
            except KeyboardInterrupt:
                raise
            except BaseException as error:
                self._report(plugin, f"{origin} failed in its hook {hook}: {error!r}")
                continue
            for backend in backends:
                if is_backend(backend):
                    self._insert(Offer(kind, backend, plugin.distribution, plugin.version))
                else:
                    self._report(plugin, f"{origin} offers {backend!r:.200} in {hook}; {_EXPECTED}")

    def _insert(self, offer: Offer) -> None:
        """Add an offer. Of two with one name, a distribution of tokenyard wins, else none does."""
        name = offer.backend.name
        contested = self._contested[offer.kind]
        other = contested.setdefault(name, offer)
        if other is offer:
            self._offers[offer.kind][name] = offer
            return
        ours = [each for each in (other, offer) if each.distribution.startswith(_OURS)]
        winner = ours[0] if len(ours) == 1 else None
        self._offers[offer.kind].pop(name, None)
        if winner is not None:
            self._offers[offer.kind][name] = winner
        reason = (
            f"{offer.kind} backend {name!r} is offered by both "
            f"{other.distribution} {other.version} and {offer.distribution} {offer.version}; "
            "uninstall one of them"
        )
        self.problems.append(Problem(offer.distribution, reason))

    def _report(self, plugin: Plugin, reason: str) -> None:
        self.problems.append(Problem(plugin.distribution, reason))


def is_backend(offered: object) -> bool:
    """Return whether a hook's item is a Backend whose fields have the right types."""
    return (
        isinstance(offered, Backend)
        and isinstance(offered.name, str)
        and isinstance(offered.path, str)
        and isinstance(offered.priority, int)
        and callable(offered.unusable)
    )


@functools.cache
def default_registry() -> Registry:
    """Return the registry of all installed plugins. It is built once per process."""
    return Registry(*installed_plugins())
