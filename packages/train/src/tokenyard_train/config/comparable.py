"""Prepare saved configs for a comparison: without parallelism, with the model's defaults."""

from __future__ import annotations

from typing import Any

from tokenyard import BackendError, ConfigError, default_registry


def comparable_config(config: dict[str, Any]) -> dict[str, Any]:
    """Return a dumped config without its parallelism keys, at any depth of `model` too."""
    return config | {"parallel": {}, "model": _without_ranks(config["model"])}


def _without_ranks(model: dict[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in model.items() if key != "moe_world_size"}
    return {
        key: _without_ranks(value) if isinstance(value, dict) else value
        for key, value in kept.items()
    }


def comparable_models(
    saved: dict[str, Any], current: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return two `model` sections as they are compared, with their defaults written out.

    Sections that describe the same model are returned equal. A model without a schema, or a
    section that is no longer valid, is compared as it is.
    """
    if saved.get("name") != current.get("name"):
        return saved, current
    try:
        old = _read(saved)
        new = _read(current)
        if old.resolve() == new.resolve():
            return current, current
    except (BackendError, ConfigError):
        return saved, current
    name = {"name": current["name"]}
    return name | old.model_dump(mode="json"), name | new.model_dump(mode="json")


def _read(section: dict[str, Any]) -> Any:
    """Return the validated keys of a `model` section. Raises ConfigError if there is no schema."""
    definition = default_registry().choose("model", section["name"]).backend.load()
    if not hasattr(definition, "read"):
        raise ConfigError(f"model {section['name']!r} has no schema")
    return definition.read({key: value for key, value in section.items() if key != "name"})
