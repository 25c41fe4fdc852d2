"""Import the installed plugins. A broken plugin does not affect the others."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.metadata import Distribution, EntryPoint, distributions
from typing import Any

from packaging.requirements import InvalidRequirement, Requirement

from tokenyard import hookspecs
from tokenyard.__about__ import __version__
from tokenyard.errors import unknown
from tokenyard.foreign import attempt

GROUP = "tokenyard"
_PREFIX = "tokenyard_"  # of hooks
_MARK = "tokenyard_impl"  # the attribute that `hookimpl` sets


@dataclass(frozen=True)
class Plugin:
    """An imported plugin module and its distribution."""

    module: Any
    distribution: str
    version: str


@dataclass(frozen=True)
class Problem:
    """A plugin that is installed but could not be loaded, with the reason in one sentence."""

    distribution: str
    reason: str


def installed_plugins(
    search: Iterable[Distribution] | None = None,
) -> tuple[list[Plugin], list[Problem]]:
    """Import all plugins of some distributions (default: all installed); report those that fail."""
    plugins: list[Plugin] = []
    problems: list[Problem] = []
    for distribution, entry in _entry_points(distributions() if search is None else search):
        name = distribution.metadata["Name"]
        version = distribution.version
        reason = _incompatible(distribution)
        if reason is None:
            plugin = f"plugin {entry.name!r} ({entry.value}) of {name} {version}"
            module, fault = attempt(entry.load)
            if fault is not None:
                reason = f"{plugin} failed to import: {fault}"
            else:
                plugins.append(Plugin(module, name, version))
                reason, fault = attempt(partial(_unknown_hook, plugin, module))
                reason = reason if fault is None else f"{plugin} cannot be searched: {fault}"
        if reason is not None:
            problems.append(Problem(name, reason))
    return plugins, problems


def _unknown_hook(plugin: str, module: Any) -> str | None:
    """Return a sentence if a plugin implements a hook that does not exist, else None."""
    known = [name for name in vars(hookspecs) if name.startswith(_PREFIX)]
    for name, value in vars(module).items():
        if name.startswith(_PREFIX) and name not in known and hasattr(value, _MARK):
            return f"{plugin} implements {unknown('hook', name, known)}"
    return None


def _entry_points(search: Iterable[Distribution]) -> Iterator[tuple[Distribution, EntryPoint]]:
    seen: set[str] = set()
    for distribution in search:
        name = distribution.metadata["Name"]
        # the first copy on the path shadows later ones, as in an import
        if name is None or name in seen:
            continue
        seen.add(name)
        for entry in distribution.entry_points:
            if entry.group == GROUP:
                yield distribution, entry


def _incompatible(distribution: Distribution) -> str | None:
    """Return the reason if a distribution requires another version of core, else None."""
    for text in distribution.requires or []:
        try:
            requirement = Requirement(text)
        except InvalidRequirement:
            continue
        if requirement.name.lower().replace("_", "-") != "tokenyard-core":
            continue
        applies = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if applies and not requirement.specifier.contains(__version__, prereleases=True):
            name = distribution.metadata["Name"]
            return (
                f"{name} {distribution.version} was written for tokenyard-core "
                f"{requirement.specifier}, but {__version__} is installed; install a {name} "
                f"made for {__version__}, or the tokenyard-core it requires"
            )
    return None
