"""Libraries that only some configs need."""

from __future__ import annotations

import importlib
from typing import Any

from tokenyard import ConfigError


def needs(module: str, wanted_by: str, install: str) -> Any:
    """Import a library. Raises ConfigError, saying who wants it and what brings it, if it is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        missing = error.name or module
        raise ConfigError(
            f'{wanted_by} needs {missing}, which is not installed; pip install "{install}"'
        ) from None
