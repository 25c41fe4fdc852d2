"""Copies between this rank's tensors and the symmetric memory of all ranks of a group.

Every rank has a buffer of one layout, and reads those of its peers. Its own rows are read from
where they are, so that only rows for peers are published. n ranks hold E / n experts each. A rank
receives up to C tokens from each rank: received row ``s * C + t`` is token t of rank s.

`buffers` [n] int64 are the addresses of all buffers, and the arguments `*_at` byte offsets in them.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _part(address, at, like):
    """Return a pointer to a part of a buffer, with the type of the pointer `like`."""
    return tl.multiple_of((address + at).to(tl.pointer_type(like.dtype.element_ty)), 16)


@triton.jit
def _copy_row(source, target, width, dim, COLUMNS: tl.constexpr):
    """Copy the first `width` of D columns of a row, and write zeros to the others."""
    for start in range(0, dim, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        value = tl.load(source + column, mask=column < width, other=0.0)
        tl.store(target + column, value, mask=column < dim)


@triton.jit(do_not_specialize=["tokens", "capacity", "rank"])
def publish_tokens(
    x,  # [T, D]
    topk_ids,  # [T, K] or None
    topk_weights,  # [T, K] or None
    buffers,  # [n]
    rows_at,  # [C, D]
    ids_at,  # [C, K]
    weights_at,  # [C, K]
    tokens_at,  # [1]
    tokens,  # T
    capacity,  # C
    rank,
    dim,  # D
    TOP_K: tl.constexpr,
    SLOTS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Copy rows of tokens to the buffer; with ids, also their ids and weights, and T.

    Of more than C tokens, the first C are copied.
    """
    token = tl.program_id(0)
    own = tl.load(buffers + rank)
    if topk_ids is not None:
        if token == 0:
            tl.store(_part(own, tokens_at, topk_ids), tokens)
    if token < tl.minimum(tokens, capacity):
        # Ids and weights.
        if topk_ids is not None:
            k = tl.arange(0, SLOTS)
            slot = token.to(tl.int64) * TOP_K + k
            ids = tl.load(topk_ids + slot, mask=k < TOP_K)
            tl.store(_part(own, ids_at, topk_ids) + slot, ids, mask=k < TOP_K)
            weights = tl.load(topk_weights + slot, mask=k < TOP_K)
            tl.store(_part(own, weights_at, topk_weights) + slot, weights, mask=k < TOP_K)

        # The row.
        first = token.to(tl.int64) * dim
        _copy_row(x + first, _part(own, rows_at, x) + first, dim, dim, COLUMNS)


@triton.jit(do_not_specialize=["capacity", "rank"])
def publish_rows(
    rows,  # [n * C, D]
    dots,  # [n * C, K] or None
    ids,  # [n * C, K] ids of this rank's experts; others are `held`
    buffers,  # [n]
    rows_at,  # [n * C, D]
    dots_at,  # [n * C, K]
    capacity,  # C
    rank,
    held,  # E / n
    dim,  # D
    TOP_K: tl.constexpr,
    SLOTS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Copy the rows that peers read to the buffer: those with an expert of this rank."""
    row = tl.program_id(0)
    k = tl.arange(0, SLOTS)
    slot = row.to(tl.int64) * TOP_K + k
    expert = tl.load(ids + slot, mask=k < TOP_K, other=held)
    used = tl.max((expert < held).to(tl.int32), 0) > 0
    if used & (row // capacity != rank):
        own = tl.load(buffers + rank)
        if dots is not None:
            value = tl.load(dots + slot, mask=k < TOP_K)
            tl.store(_part(own, dots_at, dots) + slot, value, mask=k < TOP_K)
        first = row.to(tl.int64) * dim
        _copy_row(rows + first, _part(own, rows_at, rows) + first, dim, dim, COLUMNS)


@triton.jit(do_not_specialize=["capacity", "rank"])
def pull_routing(
    buffers,  # [n]
    ids_at,  # [C, K] expert ids
    weights_at,  # [C, K]
    tokens_at,  # [1]
    ids,  # [n * C, K] ids of this rank's experts; others become `held`
    weights,  # [n * C, K] their weights; others become 0
    status,  # [n + 1]: the tokens of each rank; `bound_ids` writes the last
    counts,  # [n, blocks]: slots of this rank
    capacity,  # C
    rank,
    held,  # E / n
    TOP_K: tl.constexpr,
    SLOTS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """Read the ids and weights of the tokens of all ranks. A token that no rank has is dropped."""
    source = tl.program_id(1)
    address = tl.load(buffers + source)
    tokens = tl.load(_part(address, tokens_at, status))
    if tl.program_id(0) == 0:
        tl.store(status + source, tokens)

    # The slots of TOKENS tokens.
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)[:, None]
    k = tl.arange(0, SLOTS)[None, :]
    inside = (token < capacity) & (k < TOP_K)
    sent = inside & (token < tokens)
    slot = token.to(tl.int64) * TOP_K + k  # [TOKENS, SLOTS]
    expert = tl.load(_part(address, ids_at, ids) + slot, mask=sent, other=-1) - rank * held
    here = sent & (expert >= 0) & (expert < held)
    weight = tl.load(_part(address, weights_at, weights) + slot, mask=here, other=0.0)

    # Their received rows.
    target = (source * capacity).to(tl.int64) * TOP_K + slot
    tl.store(ids + target, tl.where(here, expert, held), mask=inside)
    tl.store(weights + target, weight, mask=inside)
    block = source * tl.num_programs(0) + tl.program_id(0)
    tl.store(counts + block, tl.sum(tl.sum(here.to(tl.int32), 1), 0))


@triton.jit(do_not_specialize=["bound"])
def bound_ids(
    ids,  # [N]
    bounded,  # [N]
    counts,  # [blocks]: slots of this rank
    slots,  # [1]
    blocks,
    bound,  # most slots
    held,  # E / n
    size,  # N
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Add up the slots, and copy ids; if there are more slots than `bound`, drop all of them."""
    b = tl.arange(0, BLOCKS)
    total = tl.sum(tl.load(counts + b, mask=b < blocks, other=0), 0)
    if tl.program_id(0) == 0:
        tl.store(slots, total)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(ids + i, mask=i < size)
    tl.store(bounded + i, tl.where(total > bound, held, value), mask=i < size)


@triton.jit(do_not_specialize=["capacity", "rank"])
def pull_rows(
    buffers,  # [n]
    rows_at,  # [C, D]
    own,  # [T, D] the rows of this rank, which are not read from its buffer
    ids,  # [n * C, K] ids of this rank's experts; others are `held`
    rows,  # [n * C, D]
    capacity,  # C
    rank,
    ranks,  # n
    held,  # E / n
    dim,  # D
    TOP_K: tl.constexpr,
    SLOTS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Read the rows of tokens that have an expert of this rank; others become 0."""
    # Neighbouring programs read from different ranks.
    source = tl.program_id(0) % ranks
    token = tl.program_id(0) // ranks
    row = (source * capacity + token).to(tl.int64)
    k = tl.arange(0, SLOTS)
    expert = tl.load(ids + row * TOP_K + k, mask=k < TOP_K, other=held)
    used = tl.max((expert < held).to(tl.int32), 0) > 0
    address = tl.load(buffers + source) + rows_at
    address = tl.where(source == rank, own.to(tl.int64), address)
    first = _part(address, 0, rows) + token.to(tl.int64) * dim
    _copy_row(first, rows + row * dim, tl.where(used, dim, 0), dim, COLUMNS)


@triton.jit(do_not_specialize=["capacity", "rank"])
def pull_sums(
    buffers,  # [n]
    rows_at,  # [n * C, D]
    dots_at,  # [n * C, K]
    own_rows,  # [n * C, D] the rows of this rank, which are not read from its buffer
    own_dots,  # [n * C, K] or None
    topk_ids,  # [T, K]
    y,  # [T, D]
    dots,  # [T, K], written with own_dots
    capacity,  # C
    rank,
    ranks,  # n
    held,  # E / n
    dim,  # D
    TOP_K: tl.constexpr,
    SLOTS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Sum the rows of each token over the ranks that hold its experts, in the order of ranks."""
    token = tl.program_id(0)
    k = tl.arange(0, SLOTS)
    slot = token.to(tl.int64) * TOP_K + k
    expert = tl.load(topk_ids + slot, mask=k < TOP_K, other=-1)
    expert = tl.where(token < capacity, expert, -1)  # a token that was not sent has none
    row = (rank * capacity + token).to(tl.int64)  # in the buffers of all ranks

    # A slot's dot is that of the rank that holds its expert.
    if own_dots is not None:
        holder = expert // held
        kept = (expert >= 0) & (holder < ranks)
        of_dots = tl.load(buffers + holder, mask=kept, other=0) + dots_at
        of_dots = tl.where(holder == rank, own_dots.to(tl.int64), of_dots)
        source = of_dots.to(tl.pointer_type(dots.dtype.element_ty)) + row * TOP_K + k
        tl.store(dots + slot, tl.load(source, mask=kept, other=0.0), mask=k < TOP_K)

    # Rows are summed in float32, or in float64.
    for start in range(0, dim, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        if y.dtype.element_ty == tl.float64:
            total = tl.zeros([COLUMNS], tl.float64)
        else:
            total = tl.zeros([COLUMNS], tl.float32)
        for r in range(ranks):
            used = tl.max(((expert >= 0) & (expert // held == r)).to(tl.int32), 0) > 0
            address = tl.load(buffers + r) + rows_at
            address = tl.where(r == rank, own_rows.to(tl.int64), address)
            pointers = _part(address, 0, y) + row * dim + column
            value = tl.load(pointers, mask=column < tl.where(used, dim, 0), other=0.0)
            total += value.to(total.dtype)
        target = y + token.to(tl.int64) * dim + column
        tl.store(target, total.to(y.dtype.element_ty), mask=column < dim)
