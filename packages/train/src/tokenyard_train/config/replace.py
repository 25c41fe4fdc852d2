"""Replace a section that an override empties, or gives another name."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf

log = logging.getLogger("tokenyard")


def replace_sections(config: DictConfig, key: str, value: str) -> None:
    """Empty the sections that the override ``key=value`` replaces, before it is merged.

    The keys of a section belong to its name: those of `mixtral` mean nothing, or something else,
    to `dbrx`. So a mapping with another `name` replaces the section, at any depth, and a warning
    lists the keys that this drops. ``section.name=x`` sets one key and replaces nothing.
    An empty mapping, as in ``callbacks={}``, leaves an empty section.
    """
    section: Any = OmegaConf.to_container(config)
    for part in key.split("."):
        section = section.get(part) if isinstance(section, Mapping) else None
    for path, old, new in _replaced(section, yaml.safe_load(value), key):
        dropped = sorted(map(str, old.keys() - new.keys()))
        OmegaConf.update(config, path, {}, merge=False)
        if dropped and new:
            log.warning(
                "the override of %s by name %r replaces the section named %r; its keys are "
                "dropped: %s; give those to keep in the override",
                path,
                new["name"],
                old["name"],
                ", ".join(dropped),
            )


def _replaced(old: Any, new: Any, path: str) -> list[tuple[str, Mapping[Any, Any], Any]]:
    """List path, old and new value of the sections that are emptied, or have another name."""
    if not (isinstance(old, Mapping) and isinstance(new, Mapping)):
        return []
    if not new or ("name" in old and "name" in new and old["name"] != new["name"]):
        return [(path, old, new)]
    return [
        item
        for key in old.keys() & new.keys()
        for item in _replaced(old[key], new[key], f"{path}.{key}")
    ]
