"""Checkpoints: tensors in safetensors files by torch's DCP, all else in JSON, and a manifest over both."""

from tokenyard_train.checkpoint.manifest import CheckpointError, verify
from tokenyard_train.checkpoint.store import (
    checkpoints,
    load_model,
    model_tensors,
    newest_good,
    read_meta,
    read_tensors,
)
from tokenyard_train.checkpoint.write import clear_unfinished, write_checkpoint

__all__ = [
    "CheckpointError",
    "checkpoints",
    "clear_unfinished",
    "load_model",
    "model_tensors",
    "newest_good",
    "read_meta",
    "read_tensors",
    "verify",
    "write_checkpoint",
]
