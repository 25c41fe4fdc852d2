"""The versions and the git commit that a run was made with."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import distributions

import torch


def versions() -> dict[str, str]:
    """Return the versions of Python, torch, CUDA and tokenyard's distributions, by name."""
    own = {
        name: distribution.version
        for distribution in distributions()
        if (name := distribution.metadata["Name"] or "").startswith("tokenyard")
    }
    found = {"python": platform.python_version(), "torch": torch.__version__}
    cuda = {"cuda": torch.version.cuda} if torch.version.cuda else {}
    return found | cuda | dict(sorted(own.items()))


def git_commit() -> str | None:
    """Return the git commit of the working directory; None outside of a repository.

    It ends in ``-dirty`` if tracked files have changes.
    """
    commit = _git("rev-parse", "HEAD")
    if not commit:
        return None
    return commit + ("-dirty" if _git("status", "--porcelain", "--untracked-files=no") else "")


def _git(*arguments: str) -> str | None:
    """Return what git prints; None if it fails or is not installed."""
    try:
        result = subprocess.run(
            ["git", *arguments], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()
