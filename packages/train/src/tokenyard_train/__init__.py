"""Training Mixture-of-Experts language models from one YAML file."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from tokenyard_train.__about__ import __version__

if TYPE_CHECKING:
    from tokenyard_train.commands.train import train
    from tokenyard_train.config import load_config
    from tokenyard_train.engine.callback import Callback

__all__ = ["Callback", "__version__", "load_config", "train"]

_HOMES = {"Callback": "engine.callback", "load_config": "config", "train": "commands.train"}


def __getattr__(name: str) -> Any:
    """Import what is asked for, and torch with it, only then."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
