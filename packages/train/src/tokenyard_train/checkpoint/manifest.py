"""The manifest of a checkpoint: the SHA-256 and size of every file in it, and a digest of itself."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from tokenyard import TokenyardError

NAME = "manifest.json"
_FORMAT = 1


class CheckpointError(TokenyardError):
    """A checkpoint is missing, damaged, or of another model; the sentence names it and what is wrong."""


def write_manifest(folder: Path) -> None:
    """Write the manifest of all files in the folder."""
    files = {path.name: _entry(path) for path in sorted(folder.iterdir())}
    body = {"format": _FORMAT, "files": files}
    (folder / NAME).write_text(json.dumps(body | {"digest": _digest(body)}, indent=1), encoding="utf-8")


def verify(folder: Path) -> None:
    """Read every byte of a checkpoint and compare; raises CheckpointError naming the first thing that is wrong."""
    body = _read(folder)
    listed, present = set(body["files"]), {path.name for path in folder.iterdir()} - {NAME}
    for name in sorted(listed - present):
        raise CheckpointError(f"checkpoint {folder}: {name} is missing")
    for name in sorted(present - listed):
        raise CheckpointError(f"checkpoint {folder}: {name} does not belong to it; remove it if you put it there")
    for name, entry in body["files"].items():
        path = folder / name
        if path.is_symlink() or not path.is_file():
            raise CheckpointError(f"checkpoint {folder}: {name} is not a plain file")
        if path.stat().st_size != entry["bytes"]:
            raise CheckpointError(f"checkpoint {folder}: {name} has {path.stat().st_size} bytes, not {entry['bytes']}")
        if _entry(path) != entry:
            raise CheckpointError(f"checkpoint {folder}: {name} was changed since it was saved (its SHA-256 differs)")


def _read(folder: Path) -> dict[str, Any]:
    path = folder / NAME
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        digest = manifest.pop("digest")
        files = manifest["files"]
        sound = digest == _digest(manifest) and manifest["format"] == _FORMAT
        sound = sound and all(
            Path(name).name == name and set(entry) == {"bytes", "sha256"} for name, entry in files.items()
        )
    except FileNotFoundError:
        raise CheckpointError(f"checkpoint {folder}: {NAME} is missing; was it saved to the end?") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(f"checkpoint {folder}: {NAME} cannot be read; it is damaged") from None
    if not sound:
        raise CheckpointError(f"checkpoint {folder}: {NAME} was changed since it was saved")
    return dict(manifest)


def _entry(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _digest(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
