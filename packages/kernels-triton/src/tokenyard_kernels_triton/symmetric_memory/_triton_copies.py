"""Launches of the copies between this rank's tensors and a region of symmetric memory.

They do what the functions of `_torch_copies` do.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tokenyard_kernels_triton._device import ceil_div, power_of_two
from tokenyard_kernels_triton.kernels import _symmetric_memory
from tokenyard_kernels_triton.launching import launch
from tokenyard_kernels_triton.symmetric_memory._region import Region, Sizes

_COLUMNS = 2048  # of a row at a time, at most
_TOKENS = 64  # of a program that reads ids


def publish_tokens(
    region: Region, x: Tensor, topk_ids: Tensor | None = None, topk_weights: Tensor | None = None
) -> None:
    """Write rows x [T, D]; with ids, also the ids and weights [T, K], and T. Of T > C, write C."""
    sizes = region.sizes
    tokens = x.shape[0]
    rank = region.rank
    grid = (max(1, min(tokens, sizes.capacity)),)
    launch(_symmetric_memory.publish_tokens, grid)(
        x,
        topk_ids,
        topk_weights,
        region.rows(rank),
        region.ids(rank),
        region.weights(rank),
        region.tokens(rank),
        tokens,
        sizes.capacity,
        sizes.dim,
        **_row_tiles(sizes),
    )


def publish_rows(region: Region, rows: Tensor, dots: Tensor | None, ids: Tensor) -> None:
    """Write the rows [n * C, D] that peers read, and their dots [n * C, K] if there are any."""
    sizes = region.sizes
    launch(_symmetric_memory.publish_rows, (sizes.received,))(
        rows,
        dots,
        ids,
        region.rows(region.rank),
        region.weights(region.rank),
        sizes.capacity,
        region.rank,
        sizes.held,
        sizes.dim,
        **_row_tiles(sizes),
    )


def pull_routing(region: Region) -> tuple[Tensor, Tensor, Tensor]:
    """Return the ids and weights [n * C, K] for this rank's experts, and status [n + 1] int32."""
    sizes = region.sizes
    layout = region.layout
    addresses = region.addresses
    ids = addresses.new_empty(sizes.received, sizes.top_k, dtype=torch.int32)
    weights = addresses.new_empty(ids.shape, dtype=sizes.weights_dtype)
    status = addresses.new_zeros(sizes.ranks + 1, dtype=torch.int32)
    launch(_symmetric_memory.pull_routing, (ceil_div(sizes.capacity, _TOKENS), sizes.ranks))(
        addresses,
        region.start + layout.ids,
        region.start + layout.weights,
        region.start + layout.tokens,
        ids,
        weights,
        status,
        sizes.capacity,
        region.rank,
        sizes.held,
        TOP_K=sizes.top_k,
        SLOTS=power_of_two(sizes.top_k),
        TOKENS=_TOKENS,
    )
    return ids, weights, status


def pull_rows(region: Region, own: Tensor, ids: Tensor) -> Tensor:
    """Return the rows [n * C, D] of tokens that have an expert of this rank; others are 0."""
    sizes = region.sizes
    rows = own.new_empty(sizes.received, sizes.dim)
    launch(_symmetric_memory.pull_rows, (sizes.received,))(
        region.addresses,
        region.start + region.layout.rows,
        own,
        ids,
        rows,
        sizes.capacity,
        region.rank,
        sizes.ranks,
        sizes.held,
        sizes.dim,
        **_row_tiles(sizes),
    )
    return rows


def bound_ids(ids: Tensor, slots: Tensor, bound: int, held: int) -> Tensor:
    """Return ids [n * C, K], or E / n for all of them if there are more slots [1] than `bound`."""
    bounded = torch.empty_like(ids)
    block = 1024
    launch(_symmetric_memory.bound_ids, (ceil_div(ids.numel(), block),))(
        ids, bounded, slots, bound, held, ids.numel(), BLOCK=block
    )
    return bounded


def sum_rows(
    region: Region, own_rows: Tensor, own_dots: Tensor | None, topk_ids: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the sums [T, D] of each token's rows over ranks, and the dots [T, K] of its slots."""
    sizes = region.sizes
    layout = region.layout
    tokens = topk_ids.shape[0]
    y = own_rows.new_empty(tokens, sizes.dim)
    slots = 0 if own_dots is None else tokens
    dots = own_rows.new_empty(slots, sizes.top_k, dtype=sizes.weights_dtype)
    if tokens:
        launch(_symmetric_memory.sum_rows, (tokens,))(
            region.addresses,
            region.start + layout.rows,
            region.start + layout.weights,
            own_rows,
            own_dots,
            topk_ids,
            y,
            dots,
            sizes.capacity,
            region.rank,
            sizes.ranks,
            sizes.held,
            sizes.dim,
            **_row_tiles(sizes),
        )
    return y, dots


def _row_tiles(sizes: Sizes) -> dict[str, int]:
    return {
        "TOP_K": sizes.top_k,
        "SLOTS": power_of_two(sizes.top_k),
        "COLUMNS": min(_COLUMNS, power_of_two(sizes.dim)),
    }
