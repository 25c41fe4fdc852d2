"""List the checkpoints of a run's folder, and read them after verification."""

from __future__ import annotations

import logging
import math
import os
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from tokenyard import LoraAdapter, LoraSettings, TokenyardError, started_processes
from tokenyard.sharded import is_sharded
from tokenyard_train.checkpoint.compare import ADAPTER
from tokenyard_train.checkpoint.manifest import CheckpointError, find_fault, is_checkpoint
from tokenyard_train.checkpoint.meta import read_meta
from tokenyard_train.distributed import is_rank0, map_over_ranks, on_rank0

_NAME = re.compile(r"ba(\d+)")

T = TypeVar("T")

log = logging.getLogger("tokenyard")


def checkpoints(folder: Path) -> list[Path]:
    """List the checkpoints of a run's folder, oldest first; none if there is no folder.

    A file or a link to nothing that has the name of a checkpoint is one, and is damaged. Raises
    CheckpointError if the folder cannot be listed.
    """
    try:
        paths = list(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise CheckpointError(
            f"folder {folder} cannot be listed ({error.strerror}), so its checkpoints are unknown; "
            "give this user the right to read it"
        ) from None
    folders = [path for path in paths if _NAME.fullmatch(path.name)]
    return sorted(folders, key=lambda path: int(path.name[2:]))


def newest_good(folder: Path) -> Path | None:
    """Return the newest checkpoint that passes verification; None if the folder has none.

    Logs the fault of each newer one. All ranks of a run call it. Raises CheckpointError if all
    checkpoints are damaged.
    """
    names = on_rank0(lambda: [path.name for path in checkpoints(folder)])
    faults: list[str] = []
    for name in reversed(names):
        if (fault := find_fault(folder / name)) is None:
            return folder / name
        if not on_rank0(partial(os.path.lexists, folder / name)):
            return newest_good(folder)  # another process pruned it, and may have saved a newer one
        faults.append(fault)
        if is_rank0():
            log.error("%s; the checkpoint before it is tried", fault)
    if faults:
        raise CheckpointError(f"no checkpoint in {folder} is good: {'; '.join(faults)}")
    return None


def read_newest(folder: Path, read: Callable[[Path], T]) -> T | None:
    """Return what `read` returns for the newest good checkpoint; None if the folder has none.

    All ranks of a run call it and read the same checkpoint. If a run in the folder deletes it while
    any rank reads, all of them read the newest again. Raises CheckpointError.
    """
    while (newest := newest_good(folder)) is not None:
        result, error = _attempt(read, newest)
        faults = _faults_of_ranks(error)
        if not faults:
            return result
        if on_rank0(partial(is_checkpoint, newest)):
            raise error or faults[0]
        if is_rank0():
            log.warning("%s was deleted while it was read; reading the newest again", newest)
    return None


def _attempt(read: Callable[[Path], T], path: Path) -> tuple[T | None, Exception | None]:
    """Return what `read` returns or raises, so that no rank leaves the others waiting."""
    try:
        return read(path), None
    except Exception as error:
        return None, error


def _faults_of_ranks(error: Exception | None) -> list[Exception]:
    """Return an error for each rank that has one, given this rank's error.

    A mistake of the user stays a CheckpointError. Any other error is a RuntimeError, after which
    `tokenyard launch` restarts the ranks.
    """
    fault = None if error is None else (isinstance(error, TokenyardError | OSError), str(error))
    faults = map_over_ranks(lambda _: fault, range(started_processes()))
    return [
        CheckpointError(message) if mistake else RuntimeError(f"another rank failed: {message}")
        for mistake, message in (one for one in faults if one is not None)
    ]


def read_tensors(checkpoint: Path, tensors: dict[str, Tensor]) -> None:
    """Fill tensors in place from a verified checkpoint.

    Raises CheckpointError if names, shapes or dtypes of the checkpoint and of `tensors` differ.
    """
    from tokenyard_train.checkpoint.dcp import read_into

    read_into(checkpoint, tensors)


def widen(tensor: Tensor) -> Tensor:
    """Return a bfloat16 tensor in float32: in host memory if it is not sharded."""
    return tensor.float() if is_sharded(tensor) else tensor.to("cpu", torch.float32)


def load_model(model: nn.Module, checkpoint: Path) -> None:
    """Fill a model's tensors from a verified checkpoint, except a base that it does not hold.

    New LoRA adapters keep their initial values if the checkpoint was trained without any. A
    checkpoint has float32 weights in every precision, so those in bfloat16 here are rounded. Raises
    CheckpointError, also for adapters of another scale.
    """
    meta = read_meta(checkpoint)
    tensors = model_tensors(model, adapters_only=meta["base"] is not None)
    lora = meta["config"].get("lora")
    if lora:
        stabilized = lora.get("use_rslora", False)
        settings = LoraSettings(lora["rank"], lora["alpha"], rank_stabilized=stabilized)
        _check_scale(model, checkpoint, settings.scale)
    else:
        tensors = {name: tensor for name, tensor in tensors.items() if ADAPTER not in name}
    wide = {name: widen(t) for name, t in tensors.items() if t.dtype == torch.bfloat16}
    read_tensors(checkpoint, tensors | wide)
    for name, tensor in wide.items():
        tensors[name].copy_(tensor)


def _check_scale(model: nn.Module, checkpoint: Path, scale: float) -> None:
    for module in model.modules():
        if isinstance(module, LoraAdapter) and not math.isclose(module.scale, scale):
            raise CheckpointError(
                f"checkpoint {checkpoint} has adapters with lora.alpha / lora.rank {scale:g}, and "
                f"the config's is {module.scale:g}; give the same alpha, rank and use_rslora"
            )


def model_tensors(model: nn.Module, adapters_only: bool = False) -> dict[str, Tensor]:
    """Return a model's state dict with the names used in checkpoints.

    `adapters_only` leaves out the frozen parameters.
    """
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    return {
        f"model.{name}": tensor.detach()
        for name, tensor in model.state_dict().items()
        if not (adapters_only and name in frozen)
    }
