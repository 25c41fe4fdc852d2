"""Read and write tensors as safetensors files by torch's distributed checkpoint (DCP).

Import this module only where tensors are read or written: importing DCP takes 2 seconds.
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
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from tokenyard import started_processes
from tokenyard_train.checkpoint.compare import TensorKind, find_mismatch
from tokenyard_train.checkpoint.manifest import CheckpointError


def read_into(checkpoint: Path, tensors: dict[str, Tensor]) -> None:
    """Fill tensors in place from a checkpoint.

    Raises CheckpointError, before anything is read, if its names, shapes or dtypes are others (see
    `find_mismatch`), or if it cannot be read.
    """
    try:
        with _no_single_process_warning():
            reader = HuggingFaceStorageReader(str(checkpoint))
            _check_tensors(checkpoint, reader, tensors)
            load(tensors, storage_reader=reader, no_dist=True)
    except CheckpointException as error:
        raise CheckpointError(
            f"checkpoint {checkpoint} is of another model: {_cause(error)}"
        ) from None
    except OSError as error:
        raise CheckpointError(f"checkpoint {checkpoint} cannot be read: {_cause(error)}") from None


def _check_tensors(
    checkpoint: Path, reader: HuggingFaceStorageReader, tensors: dict[str, Tensor]
) -> None:
    held = {
        name: TensorKind(tuple(kept.size), kept.properties.dtype)
        for name, kept in reader.read_metadata().state_dict_metadata.items()
        if isinstance(kept, TensorStorageMetadata)
    }
    wanted = {name: TensorKind(tuple(t.shape), t.dtype) for name, t in tensors.items()}
    if (mismatch := find_mismatch(held, wanted)) is not None:
        raise CheckpointError(f"checkpoint {checkpoint} is of another model: {mismatch}")


def write_tensors(folder: Path, tensors: dict[str, Tensor], group: Any) -> None:
    """Write each rank's shards to a folder. Raises CheckpointError if a write fails."""
    try:
        with _no_single_process_warning():
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
    """Return the first error in one line; DCP gathers the errors of all ranks."""
    failures = getattr(error, "failures", None)
    inner = next(iter(failures.values()))[0] if failures else error
    return " ".join(str(inner).split())


@contextmanager
def _no_single_process_warning() -> Iterator[None]:
    """Silence DCP's warning that torch.distributed is not initialised."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield
