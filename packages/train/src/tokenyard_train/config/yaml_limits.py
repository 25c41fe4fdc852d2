"""Bounds for YAML from others: its depth, its size with aliases written out, and its numbers."""

from __future__ import annotations

import re

import yaml

from tokenyard import ConfigError

_MAX_DEPTH = 40
_BASE_8 = re.compile(r"[-+]?0[0-7_]*[1-7][0-7_]*")
_BASE_60 = re.compile(r"[-+]?\d[\d_]*(:[0-5]?\d)+(\.[\d_]*)?")
_REFERENCE = re.compile(r"\$\{\s*([^.\[\]{}:\s]+)")


def check_yaml(text: str, max_size: int) -> None:
    """Raise ConfigError for YAML that could exhaust memory or the stack when it is read.

    With every alias written out, it may have `max_size` characters and 40 levels. A number that
    YAML reads in a base that it does not show is an error too.
    """
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(
            event, yaml.CollectionEndEvent
        )
        if depth > _MAX_DEPTH:
            raise ConfigError(f"it is nested deeper than {_MAX_DEPTH} levels")
        if isinstance(event, yaml.ScalarEvent) and event.implicit[0]:
            _refuse_other_bases(event.value)
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    if root is not None:
        _Expansion(max_size).measure(root)


def references(text: str) -> set[str]:
    """Return the top-level keys that ``${key}`` names, and those that hold what an alias names."""
    names = set(_REFERENCE.findall(text))
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    if not isinstance(root, yaml.MappingNode):
        return names
    places = [node.start_mark.index for node in _aliased(root)]
    for key, value in root.value:
        if any(key.start_mark.index <= place < value.end_mark.index for place in places):
            names.add(str(key.value))
    return names


def _aliased(root: yaml.Node) -> list[yaml.Node]:
    """Return the nodes that an alias names: those with several parents."""
    seen = {root}
    aliased = []
    waiting = [root]
    while waiting:
        for member in _members(waiting.pop()):
            if member in seen:
                aliased.append(member)
            else:
                seen.add(member)
                waiting.append(member)
    return aliased


class _Expansion:
    """Measures YAML with aliases written out. Each node is measured once."""

    def __init__(self, max_size: int):
        self._max_size = max_size
        self._measured: dict[yaml.Node, tuple[int, int]] = {}
        self._open: set[yaml.Node] = set()

    def measure(self, node: yaml.Node) -> tuple[int, int]:
        """Return the characters and the levels of a node. Raises ConfigError for too many."""
        if node in self._measured:
            return self._measured[node]
        if node in self._open:
            raise ConfigError("a YAML alias is inside of what it names; write its value")
        self._open.add(node)
        members = [self.measure(member) for member in _members(node)]
        own = len(node.value) if isinstance(node, yaml.ScalarNode) else 0
        size = 1 + own + sum(size for size, _ in members)
        depth = 1 + max((depth for _, depth in members), default=0)
        if size > self._max_size:
            raise ConfigError(
                f"it has more than {self._max_size:,} characters with each YAML alias written out"
            )
        if depth > _MAX_DEPTH + 1:
            raise ConfigError(f"it is nested deeper than {_MAX_DEPTH} levels")
        self._open.discard(node)
        self._measured[node] = (size, depth)
        return size, depth


def _members(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [member for pair in node.value for member in pair]
    return list(node.value) if isinstance(node, yaml.SequenceNode) else []


def _refuse_other_bases(text: str) -> None:
    """Raise ConfigError for a number that YAML reads in a base that it does not show."""
    for base, pattern in ((8, _BASE_8), (60, _BASE_60)):
        if pattern.fullmatch(text):
            raise ConfigError(
                f"{text} is a number of base {base} in YAML; "
                "write the number in base 10, or text in quotes"
            )
