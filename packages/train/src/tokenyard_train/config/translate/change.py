"""A key that was read in another way than it is written."""

from __future__ import annotations

from typing import NamedTuple


class Change(NamedTuple):
    """A key of the config as it was given, and what it was read as."""

    key: str  # such as fsdp_config.sharding_strategy
    note: str  # such as "parallel.strategy: fsdp"
    told: bool = True  # in a warning: false for what has the same effect
