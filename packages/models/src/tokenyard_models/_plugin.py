"""The plugin that the entry point `tokenyard` names."""

from __future__ import annotations

from tokenyard import Backend, hookimpl
from tokenyard_models.families import FAMILIES


@hookimpl
def tokenyard_models() -> list[Backend]:
    """Return a backend for each model family. Each imports its class when it is chosen."""
    return [Backend(name, path) for name, path in FAMILIES.items()]
