"""Checkpoint folders: written beside and renamed, verified before anything is read."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from tokenyard import TokenyardError
from tokenyard_train.checkpoint.manifest import CheckpointError, verify, write_manifest
from tokenyard_train.together import is_first, on_first, started_processes

META = "run.json"
_NAME = re.compile(r"ba(\d+)")
_UNFINISHED = ".unfinished-"

log = logging.getLogger("tokenyard")


def checkpoints(folder: Path) -> list[Path]:
    """List the checkpoints of a run's folder, oldest first."""
    found = [path for path in folder.glob("ba*") if path.is_dir() and _NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(path.name[2:]))


def newest_good(folder: Path) -> Path | None:
    """Return the newest checkpoint that verifies, warning of every newer one that does not; None if there is none.

    Raises CheckpointError if there are checkpoints and all of them are damaged.
    """
    found, faults = checkpoints(folder), []
    for path in reversed(found):
        try:
            verify(path)
        except CheckpointError as error:
            faults.append(str(error))
            log.error("%s; falling back to the one before", error)
            continue
        return path
    if faults:
        raise CheckpointError(f"no checkpoint in {folder} is good: {'; '.join(faults)}")
    return None


def write_checkpoint(folder: Path, name: str, tensors: dict[str, Tensor], meta: dict[str, Any], keep: int) -> Path:
    """Save tensors and JSON as ``folder/name``, whole or not at all, then delete all but the `keep` newest (-1: none).

    Every process of a run calls it and writes its shards; the first does the rest. Raises CheckpointError, on all of
    them, if the disk is full or cannot be written; what was saved before stays as it is.
    """
    target, unfinished = folder / name, folder / f"{_UNFINISHED}{name}"
    try:
        on_first(lambda: _writing(lambda: _begin(folder, unfinished)))
        _writing(lambda: _save_tensors(unfinished, tensors))
        on_first(lambda: _writing(lambda: _complete(unfinished, target, meta)))
    except TokenyardError as error:
        if is_first():
            shutil.rmtree(unfinished, ignore_errors=True)
        before = checkpoints(folder)
        last = f"the last good checkpoint is {before[-1]}" if before else "there is no earlier one"
        raise CheckpointError(f"checkpoint {target} could not be saved ({error}); {last}") from None
    for old in checkpoints(folder)[:-keep] if keep > 0 and is_first() else []:
        shutil.rmtree(old)
    return target


def _writing(step: Callable[[], None]) -> None:
    """Run a step; what the file system refuses becomes a CheckpointError."""
    try:
        step()
    except (OSError, CheckpointException) as error:
        raise CheckpointError(_cause(error)) from None


def _begin(folder: Path, unfinished: Path) -> None:
    clear_unfinished(folder)
    unfinished.mkdir(parents=True)


def _complete(unfinished: Path, target: Path, meta: dict[str, Any]) -> None:
    """Add what is not tensors, then the manifest; flush everything, and put it in its place."""
    (unfinished / META).write_text(json.dumps(meta, indent=1), encoding="utf-8")
    write_manifest(unfinished)
    for path in (*unfinished.iterdir(), unfinished):
        _sync(path)
    if target.exists():
        shutil.rmtree(target)
    unfinished.rename(target)
    _sync(target.parent)


def clear_unfinished(folder: Path) -> None:
    """Delete what a killed run left half-written."""
    for path in folder.glob(f"{_UNFINISHED}*"):
        shutil.rmtree(path, ignore_errors=True)


def read_meta(checkpoint: Path) -> dict[str, Any]:
    """Return the JSON part of a checkpoint that was verified."""
    meta: dict[str, Any] = json.loads((checkpoint / META).read_text(encoding="utf-8"))
    return meta


def read_tensors(checkpoint: Path, tensors: dict[str, Tensor]) -> None:
    """Fill tensors in place from a verified checkpoint; raises CheckpointError for a name or shape that it lacks."""
    try:
        with _quietly():
            dcp_load(tensors, storage_reader=HuggingFaceStorageReader(str(checkpoint)), no_dist=True)
    except (OSError, CheckpointException) as error:
        raise CheckpointError(f"checkpoint {checkpoint} is of another model: {_cause(error)}") from None


def load_model(model: nn.Module, checkpoint: Path) -> None:
    """Verify a checkpoint and fill the model's parameters and buffers from it."""
    verify(checkpoint)
    read_tensors(checkpoint, model_tensors(model))


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return a model's state under the names it has in checkpoints."""
    return {f"model.{name}": tensor.detach() for name, tensor in model.state_dict().items()}


def _save_tensors(folder: Path, tensors: dict[str, Tensor]) -> None:
    with _quietly():
        writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
        dcp_save(tensors, storage_writer=writer, no_dist=started_processes() == 1)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _cause(error: BaseException) -> str:
    failures = getattr(error, "failures", None)
    inner = next(iter(failures.values()))[0] if failures else error
    return " ".join(str(inner).split())


@contextmanager
def _quietly() -> Iterator[None]:
    """Silence DCP's remark that one process is one process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield
