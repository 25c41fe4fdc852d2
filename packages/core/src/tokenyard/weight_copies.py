"""Copies of weights that expert kernels keep, in CUDA graphs. See `CachingExpertKernel`.

A graph replays launches without Python, so no kernel sees there that a weight changed. The owner of
a graph therefore captures it in `captured_weight_copies`, and calls `renew_weight_copies` before
each replay: copies are then computed once after a change, and not by each replay.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

from torch import nn

from tokenyard.count import keeps_weight_copies
from tokenyard.interfaces import CachingExpertKernel, ExpertWeights
from tokenyard.moe import MoE, moe_layers


def renew_weight_copies(model: nn.Module) -> None:
    """Compute the copies of all weights of experts that changed since they were computed."""
    for moe, kernel in _caching(model):
        kernel.renew_weight_copies(ExpertWeights(moe.experts.up, moe.experts.down))


@contextmanager
def captured_weight_copies(model: nn.Module) -> Iterator[None]:
    """Context of the capture of a CUDA graph, whose replays read the copies of weights.

    Call `renew_weight_copies` before each replay.
    """
    kernels = [kernel for _, kernel in _caching(model)]
    renew_weight_copies(model)
    try:
        for kernel in kernels:
            kernel.captures_weight_copies = True
        yield
    finally:
        for kernel in kernels:
            kernel.captures_weight_copies = False


def _caching(model: nn.Module) -> list[tuple[MoE, CachingExpertKernel]]:
    """Return the MoE layers of a model whose kernel keeps copies, and the kernel of each."""
    layers = [moe for moe in moe_layers(model) if keeps_weight_copies(moe)]
    return [(moe, cast(CachingExpertKernel, moe.experts.kernel)) for moe in layers]
