"""Weights in float8, kept from one microbatch to the next.

Weights change once an optimizer step, and quantizing them reads and writes 4 bytes a weight. So a
weight that was quantized is kept with its storage and its version, which PyTorch counts up at each
change in place. A step of any optimizer of PyTorch drops all of them, which frees their memory. A
CUDA graph reads the same memory in each replay: `renew_weights` quantizes into it.

A change has no version if it is written through ``weight.data``, or by the replay of a CUDA graph.
Then call `drop_weights`.
"""

from __future__ import annotations

import functools
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim.optimizer import register_optimizer_step_post_hook

from tokenyard_kernels_triton.launching import can_record, current_stream
from tokenyard_kernels_triton.ops._quantize import (
    QuantizedWeights,
    quantize_weights,
    quantize_weights_into,
)

Copies = Literal["none", "kept", "captured"]
"""Which weights in float8 a pass takes: its own, those kept, or in a CUDA graph those renewed."""

_CHANGED = -1  # no version


class _State(NamedTuple):
    storage: StorageWeakRef  # an address alone may be that of another storage by now
    version: int
    stream: int  # on which the weights were quantized; another one would have to wait


class _Entry(NamedTuple):
    state: _State
    weights: QuantizedWeights
    in_graphs: bool  # CUDA graphs read this memory


_entries: dict[tuple[object, ...], _Entry] = {}


def kept_weights(weights: Tensor, captured: bool = False) -> QuantizedWeights | None:
    """Return weights [E, M, N] in float8 in both layouts, kept if they did not change.

    Returns None where nothing can be kept: while kernels are only compiled; for tensors without a
    version; and while a CUDA graph is captured, since its replays must quantize anew. With
    `captured`, that graph reads what `renew_weights` made.
    """
    if weights.is_inference() or not can_record():
        return None
    entry = _entries.get(_key(weights))
    if _capturing(weights):
        return entry.weights if captured and entry is not None and entry.in_graphs else None
    state = _state(weights)
    if entry is not None and entry.state == state:
        return entry.weights
    if entry is None or not entry.in_graphs:
        del entry  # free the old numbers before the new ones are allocated
        return _keep(weights, state, in_graphs=False)
    if entry.state.stream != state.stream:
        return None  # a graph may read that memory on its own stream meanwhile
    renew_weights(weights)
    return entry.weights


def renew_weights(weights: Tensor) -> None:
    """Quantize weights [E, M, N] if they changed, in the memory that CUDA graphs read."""
    state = _state(weights)
    entry = _entries.get(_key(weights))
    if entry is None or not entry.in_graphs:
        del entry  # free the old numbers before the new ones are allocated
        _keep(weights, state, in_graphs=True)
    elif entry.state != state:
        quantize_weights_into(weights, entry.weights)
        _entries[_key(weights)] = entry._replace(state=state)


def drop_weights() -> None:
    """Forget all weights in float8: the next pass, or `renew_weights`, quantizes them again.

    Memory that CUDA graphs read is kept.
    """
    for key, entry in list(_entries.items()):
        if entry.in_graphs:
            _entries[key] = entry._replace(state=entry.state._replace(version=_CHANGED))
        else:
            _entries.pop(key, None)


def _keep(weights: Tensor, state: _State, in_graphs: bool) -> QuantizedWeights:
    _drop_after_steps()
    _entries.pop(_key(weights), None)
    _drop_expired()
    quantized = quantize_weights(weights, forward=True, backward=True)
    _entries[_key(weights)] = _Entry(state, quantized, in_graphs)
    return quantized


def _key(weights: Tensor) -> tuple[object, ...]:
    return weights.data_ptr(), tuple(weights.shape), weights.dtype, weights.device


def _state(weights: Tensor) -> _State:
    storage = StorageWeakRef(weights.untyped_storage())
    return _State(storage, weights._version, current_stream(weights.device))


def _drop_expired() -> None:
    for key, entry in list(_entries.items()):
        if entry.state.storage.expired():
            _entries.pop(key, None)


def _capturing(tensor: Tensor) -> bool:
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


@functools.cache
def _drop_after_steps() -> None:
    """Call `drop_weights` after each step of each optimizer, from now on."""
    register_optimizer_step_post_hook(lambda *_: drop_weights())
