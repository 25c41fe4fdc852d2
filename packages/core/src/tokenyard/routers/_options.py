"""Read the options of a routing algorithm."""

from __future__ import annotations

import math

from tokenyard.errors import ConfigError
from tokenyard.workload import RoutingRule


def number_option(rule: RoutingRule, name: str, default: float) -> float:
    """Return an option that is a finite number above 0. Raises ConfigError for another value."""
    value = rule.options.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise _error(rule, name, "a finite number above 0")
    return float(value)


def count_option(rule: RoutingRule, name: str, default: int, least: int) -> int:
    """Return an option that is an integer of at least `least`. Raises ConfigError for another."""
    value = rule.options.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise _error(rule, name, f"an integer of at least {least}")
    return value


def flag_option(rule: RoutingRule, name: str, default: bool) -> bool:
    """Return an option that is true or false. Raises ConfigError for another value."""
    value = rule.options.get(name, default)
    if not isinstance(value, bool):
        raise _error(rule, name, "true or false")
    return value


def _error(rule: RoutingRule, name: str, wanted: str) -> ConfigError:
    return ConfigError(
        f"option {name!r} of the routing algorithm {rule.algorithm!r} is "
        f"{rule.options[name]!r}; give {wanted}"
    )
