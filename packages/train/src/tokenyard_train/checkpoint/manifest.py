"""The manifest of a checkpoint: size and SHA-256 of every file, and a digest of the manifest.

The ranks of a run divide the files among them for hashing, in a save and in a verification.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenyard import TokenyardError
from tokenyard.bounded import read_json
from tokenyard_train.distributed import map_over_ranks, on_rank0

MANIFEST = "manifest.json"
_FORMAT = 1

Entry = dict[str, Any]
"""The manifest's entry of a file: `bytes` and `sha256`."""


class CheckpointError(TokenyardError):
    """A checkpoint is missing, damaged, or of another model."""


def is_checkpoint(folder: Path) -> bool:
    """Return whether a folder is a checkpoint, which has a manifest. Does not verify it."""
    return (folder / MANIFEST).exists()


def entry_of(path: Path) -> Entry:
    """Return the manifest entry of a file."""
    with path.open("rb") as file:
        return {
            "bytes": path.stat().st_size,
            "sha256": hashlib.file_digest(file, "sha256").hexdigest(),
        }


def write_manifest(folder: Path, files: Mapping[str, Entry]) -> None:
    """Write the manifest of all files in a folder, given their entries by name."""
    body = {"format": _FORMAT, "files": dict(files)}
    (folder / MANIFEST).write_text(
        json.dumps(body | {"digest": manifest_digest(body)}, indent=1), encoding="utf-8"
    )


def verify(folder: Path) -> None:
    """Compare every byte of a checkpoint with its manifest. All ranks of a run call it.

    Raises CheckpointError, which names the first fault.
    """
    if (fault := find_fault(folder)) is not None:
        raise CheckpointError(fault)


def find_fault(folder: Path) -> str | None:
    """Return the first fault of a checkpoint as a sentence, the same on all ranks; None if good.

    All ranks of a run call it. Each one hashes some of the files.
    """
    fault, files = on_rank0(lambda: _check_names(folder))
    if fault is not None:
        return str(fault)
    faults = map_over_ranks(lambda item: _check_file(folder, *item), sorted(files.items()))
    for name, file_fault in zip(sorted(files), faults):
        if file_fault is not None:
            return f"checkpoint {folder}: {name} {file_fault}"
    return None


def find_fault_alone(folder: Path) -> str | None:
    """Return the first fault of a checkpoint, found by this process alone; None if good."""
    fault, files = _check_names(folder)
    if fault is not None:
        return fault
    faults = (_check_file(folder, *item) for item in sorted(files.items()))
    return next(filter(None, faults), None)


def _check_names(folder: Path) -> tuple[str | None, dict[str, Entry]]:
    """Check the manifest and the names of files. Returns a fault or None, and the entries."""
    try:
        body = _read(folder)
    except CheckpointError as error:
        return str(error), {}
    listed = set(body["files"])
    try:
        present = {path.name for path in folder.iterdir()} - {MANIFEST}
    except OSError as error:
        return f"checkpoint {folder} cannot be listed: {error.strerror}", {}
    if missing := sorted(listed - present):
        return f"checkpoint {folder}: {missing[0]} is missing", {}
    if extra := sorted(present - listed):
        return (
            f"checkpoint {folder}: {extra[0]} does not belong to it; remove it if you put it there",
            {},
        )
    return None, body["files"]


def _check_file(folder: Path, name: str, entry: Entry) -> str | None:
    """Compare a file with its entry. Returns the rest of a sentence about it, or None."""
    path = folder / name
    try:
        if path.is_symlink() or not path.is_file():
            return "is not a plain file"
        if path.stat().st_size != entry["bytes"]:
            return f"has {path.stat().st_size} bytes, not {entry['bytes']}"
        if entry_of(path) != entry:
            return "was changed since it was saved (its SHA-256 differs)"
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    return None


def _read(folder: Path) -> dict[str, Any]:
    """Read a manifest and check its digest and form. Raises CheckpointError."""
    path = folder / MANIFEST
    try:
        manifest = read_json(path, error=CheckpointError)
        digest = manifest.pop("digest")
        files = manifest["files"]
        valid = digest == manifest_digest(manifest) and manifest["format"] == _FORMAT
        # A name with a folder in it could point outside of the checkpoint.
        valid = valid and all(
            Path(name).name == name and set(entry) == {"bytes", "sha256"}
            for name, entry in files.items()
        )
    except CheckpointError as error:
        if not path.exists():
            raise CheckpointError(
                f"checkpoint {folder}: {MANIFEST} is missing; was it saved to the end?"
            ) from None
        raise CheckpointError(
            f"checkpoint {folder}: {MANIFEST} cannot be read; it is damaged ({error})"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(
            f"checkpoint {folder}: {MANIFEST} cannot be read; it is damaged"
        ) from None
    if not valid:
        raise CheckpointError(f"checkpoint {folder}: {MANIFEST} was changed since it was saved")
    return dict(manifest)


def manifest_digest(body: dict[str, Any]) -> str:
    """Return the SHA-256 of a manifest without its own digest."""
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
