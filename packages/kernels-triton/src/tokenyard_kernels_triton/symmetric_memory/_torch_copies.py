"""Copies between this rank's tensors and a region of symmetric memory, in plain torch.

They run on a CPU, and are the reference of the Triton kernels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tokenyard_kernels_triton.symmetric_memory._region import Region


def publish_tokens(
    region: Region, x: Tensor, topk_ids: Tensor | None = None, topk_weights: Tensor | None = None
) -> None:
    """Write rows x [T, D]; with ids, also the ids and weights [T, K], and T. Of T > C, write C."""
    count = min(x.shape[0], region.sizes.capacity)
    region.rows(region.rank)[:count] = x[:count]
    if topk_ids is None or topk_weights is None:
        return
    region.ids(region.rank)[:count] = topk_ids[:count]
    region.weights(region.rank)[:count] = topk_weights[:count]
    region.tokens(region.rank).fill_(x.shape[0])


def publish_rows(region: Region, rows: Tensor, dots: Tensor | None, ids: Tensor) -> None:
    """Write rows [n * C, D], and dots [n * C, K] if there are any. `ids` [n * C, K] are unused."""
    region.rows(region.rank).copy_(rows)
    if dots is not None:
        region.weights(region.rank).copy_(dots)


def pull_tokens(
    region: Region, own: Tensor, bound: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the received rows [n * C, D], weights, ids, bounded ids [n * C, K] and status [n + 1].

    Ids count this rank's experts. Other experts, and tokens past those of a rank, have the id E / n
    and the weight 0. If this rank has more slots than `bound`, all bounded ids are E / n. The
    status is int32: the number of tokens of each rank, and of slots of this one.
    """
    ids, weights, status = _pull_routing(region)
    bounded = torch.where(status[-1] > bound, region.sizes.held, ids)
    return pull_rows(region, own, ids), weights, ids, bounded, status


def pull_rows(region: Region, own: Tensor, ids: Tensor) -> Tensor:
    """Return the rows [n * C, D] of tokens that have an expert of this rank; others are 0.

    `own` [T, D] are those of this rank, which are not read from the region.
    """
    ranks, capacity, dim, _, held, *_ = region.sizes
    rows = torch.stack([region.rows(rank)[:capacity] for rank in range(ranks)])  # [n, C, D]
    count = min(own.shape[0], capacity)
    rows[region.rank, :count] = own[:count]
    used = (ids < held).any(1, keepdim=True)  # [n * C, 1]
    return torch.where(used, rows.view(-1, dim), 0)


def sum_rows(
    region: Region, own_rows: Tensor, own_dots: Tensor | None, topk_ids: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the sums [T, D] of each token's rows over ranks, and the dots [T, K] of its slots.

    Rows and dots of this rank are [n * C, D] and [n * C, K]; without dots, the result is empty. A
    dropped slot has the dot 0. Tokens past the first C have undefined sums.
    """
    ranks, capacity, dim, top_k, held, dtype, weights_dtype = region.sizes
    tokens = topk_ids.shape[0]
    count = min(tokens, capacity)
    at = slice(region.rank * capacity, region.rank * capacity + count)
    holder = topk_ids[:count] // held  # [T, K]
    total = own_rows.new_zeros(tokens, dim, dtype=torch.promote_types(dtype, torch.float32))
    dots = own_rows.new_zeros((0 if own_dots is None else tokens), top_k, dtype=weights_dtype)
    for rank in range(ranks):
        own = rank == region.rank
        rows = own_rows if own else region.rows(rank)
        used = (holder == rank).any(1, keepdim=True)
        total[:count] += torch.where(used, rows[at], 0)
        if own_dots is not None:
            there = own_dots if own else region.weights(rank)
            dots[:count] += torch.where(holder == rank, there[at], 0)
    return total.to(dtype), dots


def _pull_routing(region: Region) -> tuple[Tensor, Tensor, Tensor]:
    """Return the ids and weights [n * C, K] for this rank's experts, and the status."""
    ranks, capacity, _, top_k, held, *_ = region.sizes
    counts = torch.cat([region.tokens(rank) for rank in range(ranks)])  # [n]
    ids = torch.stack([region.ids(rank) for rank in range(ranks)])  # [n, C, K]
    weights = torch.stack([region.weights(rank)[:capacity] for rank in range(ranks)])
    token = torch.arange(capacity, device=ids.device).unsqueeze(1)  # [C, 1]
    local = ids - region.rank * held
    here = (token < counts.view(-1, 1, 1)) & (local >= 0) & (local < held)
    status = torch.cat((counts, here.sum(dtype=torch.int32).unsqueeze(0)))
    shape = (region.sizes.received, top_k)
    local = torch.where(here, local, held)
    return local.view(shape), torch.where(here, weights, 0).view(shape), status
