"""Check the weights that a run starts from: Composer's checkpoints are pickles."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tokenyard import ConfigError

_PICKLES = (".pt", ".pth", ".bin", ".ckpt")


def check_weights(config: Mapping[str, Any]) -> None:
    """Raise ConfigError for a `load_path` that is a pickle, and for optimizer states in it."""
    path = config.get("load_path")
    if not isinstance(path, str):
        return
    if path.endswith(_PICKLES):
        raise ConfigError(
            f"load_path {path!r} is a pickle, which can run code when it is read; convert it where "
            "it was made, by the script on the page From LLM Foundry and MegaBlocks"
        )
    if config.get("load_weights_only") is False:
        raise ConfigError(
            "load_weights_only is false, and load_path gives initial weights alone; say true, or "
            "resume a run by autoresume"
        )
