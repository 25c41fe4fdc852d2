"""Writing a checkpoint: beside the others, flushed, and renamed when it is whole."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from tokenyard import TokenyardError
from tokenyard_train.checkpoint.manifest import NAME as MANIFEST
from tokenyard_train.checkpoint.manifest import CheckpointError, Entry, entry_of, write_manifest
from tokenyard_train.checkpoint.store import META, checkpoints
from tokenyard_train.distributed import is_first, on_first, share_out

_UNFINISHED = ".unfinished-"

T = TypeVar("T")


def write_checkpoint(
    folder: Path,
    name: str,
    tensors: dict[str, Tensor],
    meta: dict[str, Any],
    keep: int,
    group: Any = None,
) -> Path:
    """Save tensors and JSON as ``folder/name``, whole or not at all, then delete all but the `keep` newest (-1: none).

    Every process of a run calls it and writes its shards; they share out the hashing, and the first does the rest. They
    speak over `group`, by default that of all. Raises CheckpointError, on all of them, if the disk is full or cannot be
    written; what was saved before stays as it is.
    """
    target, unfinished = folder / name, folder / f"{_UNFINISHED}{name}"
    try:
        on_first(lambda: _writing(lambda: _begin(folder, unfinished)), group)
        _writing(lambda: _save_tensors(unfinished, tensors, group))
        names = on_first(lambda: _writing(lambda: _add_meta(unfinished, meta)), group)
        entries = share_out(
            lambda name: _writing(lambda: _flushed(unfinished / name)), names, group
        )
        on_first(
            lambda: _writing(lambda: _complete(unfinished, target, dict(zip(names, entries)))),
            group,
        )
    except TokenyardError as error:
        if is_first():
            shutil.rmtree(unfinished, ignore_errors=True)
        before = checkpoints(folder)
        last = f"the last good checkpoint is {before[-1]}" if before else "there is no earlier one"
        raise CheckpointError(f"checkpoint {target} could not be saved ({error}); {last}") from None
    on_first(lambda: _writing(lambda: _prune(folder, target, keep)), group)
    return target


def _writing(step: Callable[[], T]) -> T:
    """Run a step; what the file system refuses becomes a CheckpointError."""
    try:
        return step()
    except OSError as error:
        raise CheckpointError(" ".join(str(error).split())) from None


def _begin(folder: Path, unfinished: Path) -> None:
    clear_unfinished(folder)
    unfinished.mkdir(parents=True)


def _add_meta(unfinished: Path, meta: dict[str, Any]) -> list[str]:
    """Add what is not tensors; return the names of all files."""
    (unfinished / META).write_text(json.dumps(meta, indent=1), encoding="utf-8")
    return sorted(path.name for path in unfinished.iterdir())


def _flushed(path: Path) -> Entry:
    """Bring a file to the disk, and return what the manifest says of it."""
    _sync(path)
    return entry_of(path)


def _complete(unfinished: Path, target: Path, files: dict[str, Entry]) -> None:
    """Add the manifest, and put the checkpoint in its place."""
    write_manifest(unfinished, files)
    for path in (unfinished / MANIFEST, unfinished):
        _sync(path)
    if target.exists():
        shutil.rmtree(target)
    unfinished.rename(target)
    _sync(target.parent)


def _prune(folder: Path, newest: Path, keep: int) -> None:
    """Delete all but the `keep` newest checkpoints; of those, later ones than the newest do not count.

    Later ones are damaged, or this run would have gone on from them.
    """
    known = checkpoints(folder)
    earlier = known[: known.index(newest) + 1]
    for old in earlier[:-keep] if keep > 0 else []:
        shutil.rmtree(old)


def clear_unfinished(folder: Path) -> None:
    """Delete what a killed run left half-written."""
    for path in folder.glob(f"{_UNFINISHED}*"):
        shutil.rmtree(path, ignore_errors=True)


def _save_tensors(folder: Path, tensors: dict[str, Tensor], group: Any) -> None:
    from tokenyard_train.checkpoint import dcp

    dcp.write_tensors(folder, tensors, group)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
