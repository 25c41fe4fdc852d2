"""Find models and tokenizers of the Hugging Face hub in this machine's cache. Downloads nothing."""

from __future__ import annotations

import os
import re
from pathlib import Path

from tokenyard import TokenyardError
from tokenyard.bounded import read_text

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_COMMIT = re.compile(r"[0-9a-f]{40}")


def is_hub_name(name: str) -> bool:
    """Return whether a name is of the form gpt2 or org/model."""
    return _NAME.fullmatch(name) is not None


def cached_folder(name: str) -> Path | None:
    """Return the folder of a hub name such as gpt2 or org/model in the cache; None if it has none.

    It is the snapshot of the branch main, or else the only snapshot.
    """
    if not is_hub_name(name):
        return None
    repository = _cache() / f"models--{name.replace('/', '--')}"
    snapshots = repository / "snapshots"
    if not snapshots.is_dir():
        return None
    try:
        commit = read_text(repository / "refs" / "main", 100).strip()
    except TokenyardError:
        commit = ""
    if _COMMIT.fullmatch(commit) and (snapshots / commit).is_dir():
        return snapshots / commit
    folders = [folder for folder in snapshots.iterdir() if folder.is_dir()]
    return folders[0] if len(folders) == 1 else None


def _cache() -> Path:
    """Return the folder that huggingface_hub downloads to."""
    for variable in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if os.environ.get(variable):
            return Path(os.environ[variable]).expanduser()
    home = os.environ.get("HF_HOME")
    if home:
        return Path(home).expanduser() / "hub"
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "huggingface" / "hub"
