"""Launches of the copies between this rank's tensors and a region of symmetric memory.

They do what the functions of `_torch_copies` do. Launches are replayed, see ``replay``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tokenyard_kernels_triton._device import ceil_div, on_device_of, power_of_two
from tokenyard_kernels_triton.kernels import _symmetric_memory
from tokenyard_kernels_triton.launching import launch
from tokenyard_kernels_triton.replay import replayed
from tokenyard_kernels_triton.symmetric_memory._region import Region, Sizes, layout_of

_COLUMNS = 2048  # of a row at a time, at most
_TOKENS = 64  # of a program that reads ids
_IDS = 1024  # of a program that copies ids


def publish_tokens(
    region: Region, x: Tensor, topk_ids: Tensor | None = None, topk_weights: Tensor | None = None
) -> None:
    """Write rows x [T, D]; with ids, also the ids and weights [T, K], and T. Of T > C, write C."""
    sizes = region.sizes
    tokens = x.shape[0]

    def launches(addresses: Tensor, *tensors: Any) -> tuple[()]:
        layout = layout_of(sizes)
        launch(_symmetric_memory.publish_tokens, (max(1, min(tokens, sizes.capacity)),))(
            *tensors,
            addresses,
            region.start + layout.rows,
            region.start + layout.ids,
            region.start + layout.weights,
            region.start + layout.tokens,
            tokens,
            sizes.capacity,
            region.rank,
            sizes.dim,
            **_row_tiles(sizes),
        )
        return ()

    _replayed("publish tokens", region, tokens, launches, (x, topk_ids, topk_weights))


def publish_rows(region: Region, rows: Tensor, dots: Tensor | None, ids: Tensor) -> None:
    """Write the rows [n * C, D] that peers read, and their dots [n * C, K] if there are any."""
    sizes = region.sizes

    def launches(addresses: Tensor, *tensors: Any) -> tuple[()]:
        layout = layout_of(sizes)
        launch(_symmetric_memory.publish_rows, (sizes.received,))(
            *tensors,
            addresses,
            region.start + layout.rows,
            region.start + layout.weights,
            sizes.capacity,
            region.rank,
            sizes.held,
            sizes.dim,
            **_row_tiles(sizes),
        )
        return ()

    _replayed("publish rows", region, 0, launches, (rows, dots, ids))


def pull_tokens(
    region: Region, own: Tensor, bound: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the received rows, weights, ids, bounded ids and status, as in `_torch_copies`."""

    def launches(addresses: Tensor, own: Tensor) -> tuple[Tensor, ...]:
        ids, weights, status, counts = _pull_routing(region, addresses)
        bounded = _bound_ids(ids, counts, status[region.sizes.ranks :], bound, region.sizes.held)
        return _pull_rows(region, addresses, own, ids), weights, ids, bounded, status

    rows, weights, ids, bounded, status = _replayed(
        "pull tokens", region, (bound, own.numel() == 0), launches, (own,)
    )
    return rows, weights, ids, bounded, status


def pull_rows(region: Region, own: Tensor, ids: Tensor) -> Tensor:
    """Return the rows [n * C, D] of tokens that have an expert of this rank; others are 0."""

    def launches(addresses: Tensor, own: Tensor, ids: Tensor) -> tuple[Tensor]:
        return (_pull_rows(region, addresses, own, ids),)

    (rows,) = _replayed("pull rows", region, own.numel() == 0, launches, (own, ids))
    return rows


def sum_rows(
    region: Region, own_rows: Tensor, own_dots: Tensor | None, topk_ids: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the sums [T, D] of each token's rows over ranks, and the dots [T, K] of its slots."""
    sizes = region.sizes
    tokens = topk_ids.shape[0]

    def launches(addresses: Tensor, own_rows: Tensor, *tensors: Any) -> tuple[Tensor, Tensor]:
        layout = layout_of(sizes)
        y = own_rows.new_empty(tokens, sizes.dim)
        slots = 0 if own_dots is None else tokens
        dots = own_rows.new_empty(slots, sizes.top_k, dtype=sizes.weights_dtype)
        if tokens:
            launch(_symmetric_memory.pull_sums, (tokens,))(
                addresses,
                region.start + layout.rows,
                region.start + layout.weights,
                own_rows,
                *tensors,
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

    y, dots = _replayed("sum rows", region, tokens, launches, (own_rows, own_dots, topk_ids))
    return y, dots


def _pull_routing(region: Region, addresses: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return ids and weights [n * C, K], status [n + 1] without slots, and counts of slots."""
    sizes = region.sizes
    layout = layout_of(sizes)
    blocks = ceil_div(sizes.capacity, _TOKENS)
    ids = addresses.new_empty(sizes.received, sizes.top_k, dtype=torch.int32)
    weights = addresses.new_empty(sizes.received, sizes.top_k, dtype=sizes.weights_dtype)
    status = addresses.new_empty(sizes.ranks + 1, dtype=torch.int32)
    counts = addresses.new_empty(sizes.ranks * blocks, dtype=torch.int32)
    launch(_symmetric_memory.pull_routing, (blocks, sizes.ranks))(
        addresses,
        region.start + layout.ids,
        region.start + layout.weights,
        region.start + layout.tokens,
        ids,
        weights,
        status,
        counts,
        sizes.capacity,
        region.rank,
        sizes.held,
        TOP_K=sizes.top_k,
        SLOTS=power_of_two(sizes.top_k),
        TOKENS=_TOKENS,
    )
    return ids, weights, status, counts


def _bound_ids(ids: Tensor, counts: Tensor, slots: Tensor, bound: int, held: int) -> Tensor:
    bounded = torch.empty_like(ids)
    size = ids.numel()
    blocks = counts.numel()
    launch(_symmetric_memory.bound_ids, (ceil_div(size, _IDS),))(
        ids,
        bounded,
        counts,
        slots,
        blocks,
        bound,
        held,
        size,
        BLOCK=_IDS,
        BLOCKS=power_of_two(blocks),
    )
    return bounded


def _pull_rows(region: Region, addresses: Tensor, own: Tensor, ids: Tensor) -> Tensor:
    sizes = region.sizes
    rows = own.new_empty(sizes.received, sizes.dim)
    launch(_symmetric_memory.pull_rows, (sizes.received,))(
        addresses,
        region.start + layout_of(sizes).rows,
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


def _replayed(
    name: str, region: Region, key: Any, launches: Any, tensors: tuple[Tensor | None, ...]
) -> tuple[Tensor, ...]:
    with on_device_of(region.addresses):
        return replayed((name, region.key, key), launches, (region.addresses, *tensors))


def _row_tiles(sizes: Sizes) -> dict[str, int]:
    return {
        "TOP_K": sizes.top_k,
        "SLOTS": power_of_two(sizes.top_k),
        "COLUMNS": min(_COLUMNS, power_of_two(sizes.dim)),
    }
