"""Import the installed plugins, one at a time, so that a broken one costs only itself."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import Distribution, EntryPoint, distributions
from typing import Any

from packaging.requirements import InvalidRequirement, Requirement

from tokenyard.__about__ import __version__

GROUP = "tokenyard"


@dataclass(frozen=True)
class Plugin:
    """An imported plugin module and the distribution that brought it."""

    module: Any
    distribution: str
    version: str


@dataclass(frozen=True)
class Problem:
    """A plugin that is installed but was left out, and why, in one sentence."""

    distribution: str
    reason: str


def installed_plugins(
    found: Iterable[Distribution] | None = None,
) -> tuple[list[Plugin], list[Problem]]:
    """Import every plugin of the distributions found (default: all installed); report those that fail."""
    plugins: list[Plugin] = []
    problems: list[Problem] = []
    for distribution, entry in _entry_points(distributions() if found is None else found):
        name, version = distribution.metadata["Name"], distribution.version
        reason = _refuse(distribution)
        if reason is None:
            try:
                plugins.append(Plugin(entry.load(), name, version))
            except Exception as error:
                reason = f"plugin {entry.name!r} ({entry.value}) of {name} {version} failed to import: {error!r}"
        if reason is not None:
            problems.append(Problem(name, reason))
    return plugins, problems


def _entry_points(found: Iterable[Distribution]) -> Iterator[tuple[Distribution, EntryPoint]]:
    seen: set[str] = set()
    for distribution in found:
        name = distribution.metadata["Name"]
        if (
            name is None or name in seen
        ):  # the first on the path shadows later copies, as for an import
            continue
        seen.add(name)
        for entry in distribution.entry_points:
            if entry.group == GROUP:
                yield distribution, entry


def _refuse(distribution: Distribution) -> str | None:
    for text in distribution.requires or []:
        try:
            requirement = Requirement(text)
        except InvalidRequirement:
            continue
        if requirement.name.lower().replace("_", "-") != "tokenyard-core":
            continue
        applies = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if applies and not requirement.specifier.contains(__version__, prereleases=True):
            name, version = distribution.metadata["Name"], distribution.version
            return (
                f"{name} {version} was written for tokenyard-core {requirement.specifier}, but {__version__} is "
                f"installed; install a {name} made for {__version__}, or the tokenyard-core it asks for"
            )
    return None
