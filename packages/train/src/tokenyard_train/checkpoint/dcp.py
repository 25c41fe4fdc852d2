"""Tensors in safetensors files by torch's distributed checkpoints (DCP).

Import this where tensors are read or written: DCP takes 2 seconds to import.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from tokenyard import started_processes
from tokenyard_train.checkpoint.manifest import CheckpointError


def read_into(checkpoint: Path, tensors: dict[str, Tensor]) -> None:
    """Fill tensors in place; raises CheckpointError for a name or shape that the checkpoint lacks."""
    try:
        with _quietly():
            load(tensors, storage_reader=HuggingFaceStorageReader(str(checkpoint)), no_dist=True)
    except CheckpointException as error:
        raise CheckpointError(
            f"checkpoint {checkpoint} is of another model: {_cause(error)}"
        ) from None
    except OSError as error:
        raise CheckpointError(f"checkpoint {checkpoint} cannot be read: {_cause(error)}") from None


def write_tensors(folder: Path, tensors: dict[str, Tensor], group: Any) -> None:
    """Write each rank's shards into a folder; raises CheckpointError if the disk refuses."""
    try:
        with _quietly():
            writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
            save(
                tensors,
                storage_writer=writer,
                no_dist=started_processes() == 1,
                process_group=group,
            )
    except (OSError, CheckpointException) as error:
        raise CheckpointError(_cause(error)) from None


def _cause(error: BaseException) -> str:
    """Return the first thing that went wrong, in one line; DCP gathers what each rank raised."""
    failures = getattr(error, "failures", None)
    inner = next(iter(failures.values()))[0] if failures else error
    return " ".join(str(inner).split())


@contextmanager
def _quietly() -> Iterator[None]:
    """Silence DCP's warning that one process is one process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield
