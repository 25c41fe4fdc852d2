"""Copies of weights that expert kernels keep, in CUDA graphs. See `CachingExpertKernel`.

A graph replays launches without Python, so no kernel sees there that a weight changed. The owner of
a graph therefore captures it in `captured_weight_copies`, and calls `renew_weight_copies` before
each replay: copies are then computed once after a change, and not by each replay.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import cast

from tokenyard.count import keeps_weight_copies
from tokenyard.interfaces import CachingExpertKernel, ExpertWeights
from tokenyard.moe import MoE


def renew_weight_copies(layers: Sequence[MoE]) -> None:
    """Compute the copies of all weights of experts that changed since they were computed."""
    for moe, kernel in _caching(layers):
        kernel.renew_weight_copies(ExpertWeights(moe.experts.up, moe.experts.down))


@contextmanager
def captured_weight_copies(layers: Sequence[MoE]) -> Iterator[None]:
    """Context of the capture of a CUDA graph, whose replays read the copies of layers' weights.

    Call `renew_weight_copies` before each replay.
    """
    kernels = [kernel for _, kernel in _caching(layers)]
    renew_weight_copies(layers)
    try:
        for kernel in kernels:
            kernel.captures_weight_copies = True
        yield
    finally:
        for kernel in kernels:
            kernel.captures_weight_copies = False


def _caching(layers: Sequence[MoE]) -> list[tuple[MoE, CachingExpertKernel]]:
    """Return the layers whose kernel keeps copies, and the kernel of each."""
    caching = filter(keeps_weight_copies, layers)
    return [(moe, cast(CachingExpertKernel, moe.experts.kernel)) for moe in caching]
