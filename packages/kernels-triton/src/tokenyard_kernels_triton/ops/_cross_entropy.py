"""The cross-entropy of a chunk of tokens in one launch."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenyard_kernels_triton._device import on_device_of, power_of_two
from tokenyard_kernels_triton.kernels._cross_entropy import cross_entropy
from tokenyard_kernels_triton.launching import launch

_BLOCK = 4096  # logits of a row at a time


def replace_by_gradient(logits: Tensor, ids: Tensor, scale: Tensor) -> Tensor:
    """Do as ``tokenyard.cross_entropy.replace_by_gradient``, for float32 scales."""
    tokens, vocabulary = logits.shape
    nats = torch.empty_like(scale)
    if tokens == 0:
        return nats
    block = min(_BLOCK, power_of_two(vocabulary))
    with on_device_of(logits):
        launch(cross_entropy, (tokens,))(
            logits, ids, scale, nats, vocabulary, BLOCK=block, num_warps=8 if block > 1024 else 4
        )
    return nats
