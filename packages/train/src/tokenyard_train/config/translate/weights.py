"""Check the weights that a run starts from: Composer's checkpoints are pickles."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenyard import ConfigError

_PICKLE = re.compile(
    r"\.(pt|pth|bin|ckpt|distcp|tar|tgz|symlink)(\.(gz|bz2|lz4|lzma|lzo|xz|zst|symlink))?$"
)


def check_weights(config: Mapping[str, Any]) -> None:
    """Raise ConfigError for a `load_path` that is a pickle, and for optimizer states in it."""
    path = config.get("load_path")
    if not isinstance(path, str):
        return
    if _PICKLE.search(path) or _is_sharded(Path(path).expanduser()):
        raise ConfigError(
            f"load_path {path!r} is a pickle, which can run code when it is read; convert it where "
            "it was made by examples/composer_to_safetensors.py of the repository, and give the "
            "folder that it writes"
        )
    if config.get("load_weights_only") is False:
        raise ConfigError(
            "load_weights_only is false, and load_path gives initial weights alone; say true, or "
            "resume a run by autoresume"
        )


def _is_sharded(folder: Path) -> bool:
    """Return whether a folder is a checkpoint of pickles, as torch.distributed.checkpoint saves."""
    return folder.is_dir() and any(folder.glob("*.distcp"))
