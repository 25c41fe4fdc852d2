"""Checkpoints: tensors in safetensors files (torch DCP), metadata in JSON, and a manifest."""

from tokenyard_train.checkpoint.manifest import CheckpointError, is_checkpoint, verify
from tokenyard_train.checkpoint.meta import read_meta
from tokenyard_train.checkpoint.store import (
    checkpoints,
    load_model,
    model_tensors,
    newest_good,
    read_newest,
    read_tensors,
    widen,
)
from tokenyard_train.checkpoint.write import clear_unfinished, write_checkpoint

__all__ = [
    "CheckpointError",
    "checkpoints",
    "clear_unfinished",
    "is_checkpoint",
    "load_model",
    "model_tensors",
    "newest_good",
    "read_meta",
    "read_newest",
    "read_tensors",
    "verify",
    "widen",
    "write_checkpoint",
]
