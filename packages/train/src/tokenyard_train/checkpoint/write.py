"""Write a checkpoint: to an unfinished folder, flushed to disk, renamed when complete."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from tokenyard import TokenyardError
from tokenyard.paths import remove
from tokenyard_train.checkpoint.manifest import (
    MANIFEST,
    CheckpointError,
    Entry,
    entry_of,
    find_fault_alone,
    write_manifest,
)
from tokenyard_train.checkpoint.meta import META
from tokenyard_train.checkpoint.store import checkpoints
from tokenyard_train.distributed import is_rank0, map_over_ranks, on_rank0

log = logging.getLogger("tokenyard")

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
    """Save tensors and JSON as checkpoint ``folder/name`` atomically, then prune old checkpoints.

    Keeps the `keep` newest checkpoints (-1: all). All ranks of a run call it. Each rank writes its
    shards and hashes some of the files. Rank 0 does the rest. `group` defaults to all ranks. Raises
    CheckpointError on all ranks if a write fails. Earlier checkpoints then stay unchanged.
    """
    target = folder / name
    unfinished = folder / f"{_UNFINISHED}{name}"
    try:
        on_rank0(lambda: _write(lambda: _begin(folder, unfinished)), group)
        _write(lambda: _save_tensors(unfinished, tensors, group))
        names = on_rank0(lambda: _write(lambda: _add_meta(unfinished, meta)), group)
        entries = map_over_ranks(
            lambda name: _write(lambda: _flush(unfinished / name)), names, group
        )
        files = dict(zip(names, entries))
        on_rank0(lambda: _write(lambda: _complete(unfinished, target, files)), group)
    except TokenyardError as error:
        if is_rank0():
            shutil.rmtree(unfinished, ignore_errors=True)
        last = on_rank0(lambda: _describe_last_good(folder), group)
        raise CheckpointError(f"checkpoint {target} could not be saved ({error}); {last}") from None
    on_rank0(lambda: _write(lambda: _prune(folder, target, keep)), group)
    return target


def _describe_last_good(folder: Path) -> str:
    try:
        earlier = checkpoints(folder)
    except CheckpointError as error:
        return str(error)
    good = next((path for path in reversed(earlier) if find_fault_alone(path) is None), None)
    if good is not None:
        return f"the last good checkpoint is {good}"
    return "no earlier one is good" if earlier else "there is no earlier one"


def _write(step: Callable[[], T]) -> T:
    """Run a step. Raises CheckpointError for an error of the file system."""
    try:
        return step()
    except OSError as error:
        raise CheckpointError(" ".join(str(error).split())) from None


def _begin(folder: Path, unfinished: Path) -> None:
    clear_unfinished(folder)
    unfinished.mkdir(parents=True)


def _add_meta(unfinished: Path, meta: dict[str, Any]) -> list[str]:
    """Write the JSON part; return the names of all files."""
    (unfinished / META).write_text(json.dumps(meta, indent=1), encoding="utf-8")
    return sorted(path.name for path in unfinished.iterdir())


def _flush(path: Path) -> Entry:
    """Flush a file to disk and return its manifest entry."""
    _sync(path)
    return entry_of(path)


def _complete(unfinished: Path, target: Path, files: dict[str, Entry]) -> None:
    """Write the manifest, flush, and rename the folder to the checkpoint's name."""
    write_manifest(unfinished, files)
    for path in (unfinished / MANIFEST, unfinished):
        _sync(path)
    remove(target)
    unfinished.rename(target)
    _sync(target.parent)


def _prune(folder: Path, newest: Path, keep: int) -> None:
    """Delete all but the `keep` newest checkpoints up to and including `newest`.

    Checkpoints of later steps do not count. They are damaged, or this run would have resumed there.
    """
    existing = checkpoints(folder)
    candidates = existing[: existing.index(newest) + 1]
    for old in candidates[:-keep] if keep > 0 else []:
        # Renamed first: a reader then misses the whole checkpoint, and not some of its files.
        unfinished = folder / f"{_UNFINISHED}{old.name}"
        try:
            remove(unfinished)
            old.rename(unfinished)
            remove(unfinished)
        except OSError as error:
            log.warning(
                "checkpoint %s cannot be deleted (%s); delete it, or set "
                "save_num_checkpoints_to_keep: -1",
                unfinished if unfinished.exists() else old,
                error.strerror,
            )


def clear_unfinished(folder: Path) -> None:
    """Delete the unfinished checkpoints of a killed run."""
    for path in folder.glob(f"{_UNFINISHED}*"):
        with suppress(OSError):
            remove(path)


def _save_tensors(folder: Path, tensors: dict[str, Tensor], group: Any) -> None:
    from tokenyard_train.checkpoint import dcp

    dcp.write_tensors(folder, tensors, group)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
