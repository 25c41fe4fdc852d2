"""The manifest of a checkpoint: the SHA-256 and size of every file in it, and a digest of itself.

The processes of a run share out the files to hash, when they save and when they verify.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenyard import TokenyardError
from tokenyard_train.distributed import on_first, share_out

NAME = "manifest.json"
_FORMAT = 1

Entry = dict[str, Any]
"""What the manifest says of a file: `bytes` and `sha256`."""


class CheckpointError(TokenyardError):
    """A checkpoint is missing, damaged, or of another model; the sentence names it and what is wrong."""


def entry_of(path: Path) -> Entry:
    """Return what the manifest says of a file."""
    with path.open("rb") as file:
        return {
            "bytes": path.stat().st_size,
            "sha256": hashlib.file_digest(file, "sha256").hexdigest(),
        }


def write_manifest(folder: Path, files: Mapping[str, Entry]) -> None:
    """Write the manifest of all files in the folder, by name."""
    body = {"format": _FORMAT, "files": dict(files)}
    (folder / NAME).write_text(
        json.dumps(body | {"digest": _digest(body)}, indent=1), encoding="utf-8"
    )


def verify(folder: Path) -> None:
    """Read every byte of a checkpoint and compare; raises CheckpointError naming the first thing that is wrong.

    Every process of a run calls it, and reads some of the files.
    """
    if (fault := fault_in(folder)) is not None:
        raise CheckpointError(fault)


def fault_in(folder: Path) -> str | None:
    """Return the first thing that is wrong with a checkpoint, on every process of a run alike; None if it is good."""
    said, files = on_first(lambda: _listed(folder))
    if said is not None:
        return str(said)
    changed = share_out(lambda item: _changed(folder, *item), sorted(files.items()))
    return next(
        (
            f"checkpoint {folder}: {name} {what}"
            for name, what in zip(sorted(files), changed)
            if what
        ),
        None,
    )


def _listed(folder: Path) -> tuple[str | None, dict[str, Entry]]:
    """Return what is wrong with the manifest or the names of files; or the entries."""
    try:
        body = _read(folder)
    except CheckpointError as error:
        return str(error), {}
    listed, present = set(body["files"]), {path.name for path in folder.iterdir()} - {NAME}
    if missing := sorted(listed - present):
        return f"checkpoint {folder}: {missing[0]} is missing", {}
    if strange := sorted(present - listed):
        return (
            f"checkpoint {folder}: {strange[0]} does not belong to it; remove it if you put it there",
            {},
        )
    return None, body["files"]


def _changed(folder: Path, name: str, entry: Entry) -> str | None:
    path = folder / name
    try:
        if path.is_symlink() or not path.is_file():
            return "is not a plain file"
        if path.stat().st_size != entry["bytes"]:
            return f"has {path.stat().st_size} bytes, not {entry['bytes']}"
        return (
            None
            if entry_of(path) == entry
            else "was changed since it was saved (its SHA-256 differs)"
        )
    except OSError as error:
        return f"cannot be read: {error.strerror}"


def _read(folder: Path) -> dict[str, Any]:
    path = folder / NAME
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        digest = manifest.pop("digest")
        files = manifest["files"]
        sound = digest == _digest(manifest) and manifest["format"] == _FORMAT
        sound = sound and all(
            Path(name).name == name and set(entry) == {"bytes", "sha256"}
            for name, entry in files.items()
        )
    except FileNotFoundError:
        raise CheckpointError(
            f"checkpoint {folder}: {NAME} is missing; was it saved to the end?"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(
            f"checkpoint {folder}: {NAME} cannot be read; it is damaged"
        ) from None
    if not sound:
        raise CheckpointError(f"checkpoint {folder}: {NAME} was changed since it was saved")
    return dict(manifest)


def _digest(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
