"""Weights in float8, kept from one microbatch to the next.

Weights change once an optimizer step, and quantizing them reads and writes 4 bytes a weight. So a
weight that was quantized is kept with its storage and its version, which PyTorch counts up at each
change in place. A step of any optimizer of PyTorch drops all of them, which frees their memory.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim.optimizer import register_optimizer_step_post_hook

from tokenyard_kernels_triton.launching import can_record, current_stream
from tokenyard_kernels_triton.ops._quantize import QuantizedWeights, quantize_weights


class _Entry(NamedTuple):
    storage: StorageWeakRef
    version: int
    weights: QuantizedWeights


_entries: dict[tuple[object, ...], _Entry] = {}


def kept_weights(weights: Tensor) -> QuantizedWeights | None:
    """Return weights [E, M, N] in float8 in both layouts, kept if they did not change.

    Returns None where nothing can be kept: while a CUDA graph is captured, since its replays must
    quantize anew; while kernels are only compiled; and for tensors without a version.
    """
    if weights.is_inference() or not can_record() or _capturing(weights):
        return None
    _drop_after_steps()
    # Another stream would not wait until the copies are written.
    place = (weights.device, current_stream())
    key = (weights.data_ptr(), tuple(weights.shape), weights.dtype, place)
    entry = _entries.get(key)
    if entry is None or entry.storage.expired() or entry.version != weights._version:
        del entry
        _drop_expired(key)  # free the old copies before the new ones are allocated
        quantized = quantize_weights(weights, forward=True, backward=True)
        storage = StorageWeakRef(weights.untyped_storage())
        entry = _entries[key] = _Entry(storage, weights._version, quantized)
    return entry.weights


def drop_weights() -> None:
    """Forget all weights in float8. The next forward pass quantizes them again."""
    _entries.clear()


def _drop_expired(also: tuple[object, ...]) -> None:
    """Drop the entries of freed weights, and the one with the key `also`."""
    for key, entry in list(_entries.items()):
        if key == also or entry.storage.expired():
            _entries.pop(key, None)


def _capturing(tensor: Tensor) -> bool:
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


@functools.cache
def _drop_after_steps() -> None:
    """Call `drop_weights` after each step of each optimizer, from now on."""
    register_optimizer_step_post_hook(lambda *_: drop_weights())
