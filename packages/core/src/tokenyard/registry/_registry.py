"""The registry: all backends of the installed plugins, by kind and name."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable
from functools import partial
from typing import Any

import pluggy

from tokenyard import hookspecs
from tokenyard.backend import KINDS, Backend, Kind
from tokenyard.errors import BackendError
from tokenyard.foreign import attempt, shown
from tokenyard.registry._choose import (
    BackendChoice,
    Request,
    check_algorithm,
    choose,
    overridden,
    parse_request,
    variable,
)
from tokenyard.registry._discover import Plugin, Problem, installed_plugins
from tokenyard.registry._offers import Offer
from tokenyard.registry._options import check_options
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
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")
_PATH = re.compile(r"[A-Za-z_][\w.]{0,999}:[A-Za-z_]\w{0,199}")


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
        the request, the reason, and what would work; also for an option that the backend does not
        have.
        """
        name, options = parse_request(kind, request)
        offers = self.offers(kind)
        if kind == "router" and workload is not None:
            check_algorithm(workload.router.algorithm, offers)
        try:
            chosen = choose(kind, name, options, offers, self.problems, workload)
            check_options(chosen, offers)
            return chosen
        except BackendError as error:
            if name != overridden(kind):
                raise
            raise BackendError(f"{error} (set by {variable(kind)})") from None

    def _add(self, plugin: Plugin) -> None:
        manager = pluggy.PluginManager("tokenyard")
        manager.add_hookspecs(hookspecs)
        origin = f"{plugin.distribution} {plugin.version}"
        _, fault = attempt(lambda: manager.register(plugin.module))
        if fault is not None:
            self._report(plugin, f"{origin} cannot be registered: {fault}")
            return
        for kind, hook in HOOKS.items():
            backends, fault = attempt(partial(_offered, manager, hook))
            if backends is None:
                self._report(plugin, f"{origin} failed in its hook {hook}: {fault}")
                continue
            for backend in backends:
                fault = fault_of(backend)
                if fault is None:
                    self._insert(Offer(kind, backend, plugin.distribution, plugin.version))
                else:
                    offer = shown(backend)
                    self._report(plugin, f"{origin} offers {offer} in {hook}; {fault}")

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


def _offered(manager: pluggy.PluginManager, hook: str) -> list[Any]:
    return [backend for group in getattr(manager.hook, hook)() for backend in group]


def fault_of(offered: object) -> str | None:
    """Return why a hook's item cannot be an offer, else None."""
    if not isinstance(offered, Backend):
        return "an offer is a tokenyard.Backend"
    name, path = offered.name, offered.path
    if not isinstance(name, str) or not _NAME.fullmatch(name) or name == "auto":
        return "its name is a text of letters, digits, dots, dashes and underscores, but not auto"
    if not isinstance(path, str) or not _PATH.fullmatch(path):
        return "its path is module:Class"
    if not isinstance(offered.priority, int) or not callable(offered.unusable):
        return "its priority is an int, and unusable a function"
    if not isinstance(offered.algorithm, str | None):
        return "its algorithm is a text or None"
    return None


@functools.cache
def default_registry() -> Registry:
    """Return the registry of all installed plugins. It is built once per process."""
    return Registry(*installed_plugins())
