"""Checkpoint folders: which there are, and reading from them, verified."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from tokenyard_train.checkpoint.manifest import CheckpointError, fault_in, verify
from tokenyard_train.distributed import is_first, on_first

META = "run.json"
_NAME = re.compile(r"ba(\d+)")

log = logging.getLogger("tokenyard")


def checkpoints(folder: Path) -> list[Path]:
    """List the checkpoints of a run's folder, oldest first."""
    found = [path for path in folder.glob("ba*") if path.is_dir() and _NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(path.name[2:]))


def newest_good(folder: Path) -> Path | None:
    """Return the newest checkpoint that verifies, warning of every newer one that does not; None if there is none.

    Every process of a run calls it. Raises CheckpointError if there are checkpoints and all of them are damaged.
    """
    names, faults = on_first(lambda: [path.name for path in checkpoints(folder)]), []
    for name in reversed(names):
        if (fault := fault_in(folder / name)) is None:
            return folder / name
        faults.append(fault)
        if is_first():
            log.error("%s; falling back to the one before", fault)
    if faults:
        raise CheckpointError(f"no checkpoint in {folder} is good: {'; '.join(faults)}")
    return None


def read_meta(checkpoint: Path) -> dict[str, Any]:
    """Return the JSON part of a checkpoint that was verified."""
    meta: dict[str, Any] = json.loads((checkpoint / META).read_text(encoding="utf-8"))
    return meta


def read_tensors(checkpoint: Path, tensors: dict[str, Tensor]) -> None:
    """Fill tensors in place from a verified checkpoint; raises CheckpointError for a name or shape that it lacks."""
    from tokenyard_train.checkpoint.dcp import read_into

    read_into(checkpoint, tensors)


def load_model(model: nn.Module, checkpoint: Path) -> None:
    """Verify a checkpoint and fill the model's tensors from it; adapters, if it was trained with some."""
    verify(checkpoint)
    tensors = model_tensors(model)
    if not read_meta(checkpoint)["config"].get("lora"):
        tensors = {name: tensor for name, tensor in tensors.items() if ".adapter." not in name}
    read_tensors(checkpoint, tensors)


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return a model's state under the names it has in checkpoints."""
    return {f"model.{name}": tensor.detach() for name, tensor in model.state_dict().items()}
