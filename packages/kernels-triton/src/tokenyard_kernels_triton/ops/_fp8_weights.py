"""Weights in float8, kept from one microbatch to the next.

Weights change once an optimizer step, and quantizing them reads and writes 4 bytes a weight. So a
weight that was quantized is kept with its storage and its version, which PyTorch counts up at each
change in place. A step of any optimizer of PyTorch drops all of them, which frees their memory.

A change has no version if it is written through ``weight.data``, or by the replay of a CUDA graph.
Then call `drop_weights`.
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
    storage: StorageWeakRef  # an address alone may be that of another storage by now
    version: int
    stream: int  # on which the weights were quantized; another one would have to wait
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
    key = (weights.data_ptr(), tuple(weights.shape), weights.dtype, weights.device)
    state = (StorageWeakRef(weights.untyped_storage()), weights._version, current_stream())
    entry = _entries.get(key)
    if entry is not None and entry[:3] == state:
        return entry.weights
    del entry
    _entries.pop(key, None)  # free the old numbers before the new ones are allocated
    _drop_expired()
    quantized = quantize_weights(weights, forward=True, backward=True)
    _entries[key] = _Entry(*state, quantized)
    return quantized


def drop_weights() -> None:
    """Forget all weights in float8. The next forward pass quantizes them again."""
    _entries.clear()


def _drop_expired() -> None:
    for key, entry in list(_entries.items()):
        if entry.storage.expired():
            _entries.pop(key, None)


def _capturing(tensor: Tensor) -> bool:
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


@functools.cache
def _drop_after_steps() -> None:
    """Call `drop_weights` after each step of each optimizer, from now on."""
    register_optimizer_step_post_hook(lambda *_: drop_weights())
