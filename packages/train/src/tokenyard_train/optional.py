"""Optional libraries, imported only by the configs that use them."""

from __future__ import annotations

import importlib
from typing import Any

from tokenyard import ConfigError


def require(module: str, wanted_by: str, install: str) -> Any:
    """Import a library for `wanted_by`, a config key or an option.

    Raises ConfigError, naming what to `install`, if the library is missing or does not load.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        missing = error.name or module
        raise ConfigError(
            f'{wanted_by} needs {missing}, which is not installed; pip install "{install}"'
        ) from None
    except ImportError as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"{wanted_by} needs {module}, which cannot be imported: {reason}; "
            f'pip install --upgrade "{install}"'
        ) from None
