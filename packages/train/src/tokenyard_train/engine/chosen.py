"""The config of a run with the backends that were chosen for `auto`."""

from __future__ import annotations

from typing import Any

from tokenyard_train.engine.setup import Setup


def dump_with_backends(setup: Setup) -> dict[str, Any]:
    """Return the dumped config of a run. Chosen backends replace `auto`.

    All MoE layers of a model have the same backends. Without such layers, `auto` remains.
    """
    dumped: dict[str, Any] = setup.config.model_dump(mode="json")
    for moe in setup.layers[:1]:
        for part, chosen in moe.chosen.items():
            name = chosen.backend.name
            setting = dumped["backends"].get(part)
            named = setting | {"name": name} if isinstance(setting, dict) else name
            dumped["backends"][part] = named
    return dumped
