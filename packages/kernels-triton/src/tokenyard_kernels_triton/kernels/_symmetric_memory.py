"""Copies between this rank's tensors and the symmetric memory of all ranks of a group.

Every rank has a buffer of one layout, and reads those of its peers. Its own rows are read from
where they are, so that only rows for peers are published. n ranks hold E / n experts each. A rank
receives up to C tokens from each rank: received row ``s * C + t`` is token t of rank s.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["tokens", "capacity"])
def publish_tokens(
    x,  # [T, D]
    topk_ids,  # [T, K] or None
    topk_weights,  # [T, K] or None
    to_rows,  # [C, D], in the buffer
    to_ids,  # [C, K], in the buffer
    to_weights,  # [C, K], in the buffer
    to_tokens,  # [1], in the buffer
    tokens,  # T
    capacity,  # C
    dim,  # D
    TOP_K: tl.constexpr,
    SLOTS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Copy rows of tokens to the buffer; with ids, also their ids and weights, and T.

    Of more than C tokens, the first C are copied.
    """
    token = tl.program_id(0)
    if topk_ids is not None:
        if token == 0:
            tl.store(to_tokens, tokens)
    if token < tl.minimum(tokens, capacity):
        # Ids and weights.
        if topk_ids is not None:
            k = tl.arange(0, SLOTS)
            inside = k < TOP_K
            slot = token.to(tl.int64) * TOP_K + k
            tl.store(to_ids + slot, tl.load(topk_ids + slot, mask=inside), mask=inside)
            tl.store(to_weights + slot, tl.load(topk_weights + slot, mask=inside), mask=inside)

        # The row.
        first = token.to(tl.int64) * dim
        for start in range(0, dim, COLUMNS):
            column = start + tl.arange(0, COLUMNS)
            value = tl.load(x + first + column, mask=column < dim)
            tl.store(to_rows + first + column, value, mask=column < dim)


@triton.jit(do_not_specialize=["capacity", "rank"])
def publish_rows(
    rows,  # [n * C, D]
    dots,  # [n * C, K], or None
    ids,  # [n * C, K] ids of this rank's experts; others are `held`
    to_rows,  # [n * C, D], in the buffer
    to_dots,  # [n * C, K], in the buffer
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
        if dots is not None:
            tl.store(to_dots + slot, tl.load(dots + slot, mask=k < TOP_K), mask=k < TOP_K)
        first = row.to(tl.int64) * dim
        for start in range(0, dim, COLUMNS):
            column = start + tl.arange(0, COLUMNS)
            value = tl.load(rows + first + column, mask=column < dim)
            tl.store(to_rows + first + column, value, mask=column < dim)


@triton.jit(do_not_specialize=["capacity", "rank"])
def pull_routing(
    buffers,  # [n] int64: the address of each rank's buffer
    ids_at,  # byte offset of [C, K] expert ids in a buffer
    weights_at,  # byte offset of [C, K] weights
    tokens_at,  # byte offset of the number of tokens
    ids,  # [n * C, K] ids of this rank's experts; others become `held`
    weights,  # [n * C, K] their weights; others become 0
    status,  # [n + 1], zero: the tokens of each rank, then slots of this rank
    capacity,  # C
    rank,
    held,  # E / n
    TOP_K: tl.constexpr,
    SLOTS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """Read the ids and weights of the tokens of all ranks. A token that no rank has is dropped."""
    source = tl.program_id(1)
    base = tl.load(buffers + source)
    tokens = tl.load((base + tokens_at).to(tl.pointer_type(tl.int32)))
    if tl.program_id(0) == 0:
        tl.store(status + source, tokens)

    # The slots of TOKENS tokens.
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)[:, None]
    k = tl.arange(0, SLOTS)[None, :]
    inside = (token < capacity) & (k < TOP_K)
    sent = inside & (token < tokens)
    slot = token.to(tl.int64) * TOP_K + k  # [TOKENS, SLOTS]
    from_ids = (base + ids_at).to(tl.pointer_type(tl.int32))
    expert = tl.load(from_ids + slot, mask=sent, other=-1) - rank * held
    here = sent & (expert >= 0) & (expert < held)
    from_weights = (base + weights_at).to(tl.pointer_type(weights.dtype.element_ty))
    weight = tl.load(from_weights + slot, mask=here, other=0.0)

    # Their received rows.
    target = (source * capacity).to(tl.int64) * TOP_K + slot
    tl.store(ids + target, tl.where(here, expert, held), mask=inside)
    tl.store(weights + target, weight, mask=inside)
    tl.atomic_add(status + tl.num_programs(1), tl.sum(tl.sum(here.to(tl.int32), 1), 0))


@triton.jit(do_not_specialize=["bound"])
def bound_ids(
    ids,  # [N]
    bounded,  # [N]
    slots,  # [1]
    bound,  # most slots
    held,  # E / n
    size,  # N
    BLOCK: tl.constexpr,
):
    """Copy ids; if there are more slots than `bound`, drop all of them instead."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(ids + i, mask=i < size)
    tl.store(bounded + i, tl.where(tl.load(slots) > bound, held, value), mask=i < size)


@triton.jit(do_not_specialize=["capacity", "rank"])
def pull_rows(
    buffers,  # [n] int64: the address of each rank's buffer
    rows_at,  # byte offset of [C, D] rows in a buffer
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

    # An unused row reads no columns.
    base = tl.load(buffers + source) + rows_at
    base = tl.where(source == rank, own.to(tl.int64), base)
    pointer = tl.multiple_of(base.to(tl.pointer_type(rows.dtype.element_ty)), 16)
    width = tl.where(used, dim, 0)
    for start in range(0, dim, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        value = tl.load(pointer + token.to(tl.int64) * dim + column, mask=column < width, other=0.0)
        tl.store(rows + row * dim + column, value, mask=column < dim)


@triton.jit(do_not_specialize=["capacity", "rank"])
def sum_rows(
    buffers,  # [n] int64: the address of each rank's buffer
    rows_at,  # byte offset of [n * C, D] rows in a buffer
    dots_at,  # byte offset of [n * C, K]
    own_rows,  # [n * C, D] the rows of this rank, which are not read from its buffer
    own_dots,  # [n * C, K], or None
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
        dots_base = tl.load(buffers + holder, mask=kept, other=0) + dots_at
        dots_base = tl.where(holder == rank, own_dots.to(tl.int64), dots_base)
        source = dots_base.to(tl.pointer_type(dots.dtype.element_ty)) + row * TOP_K + k
        tl.store(dots + slot, tl.load(source, mask=kept, other=0.0), mask=k < TOP_K)

    for start in range(0, dim, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        if y.dtype.element_ty == tl.float64:
            total = tl.zeros([COLUMNS], tl.float64)
        else:
            total = tl.zeros([COLUMNS], tl.float32)
        for r in range(ranks):
            used = tl.max(((expert >= 0) & (expert // held == r)).to(tl.int32), 0) > 0
            base = tl.load(buffers + r) + rows_at
            base = tl.where(r == rank, own_rows.to(tl.int64), base)
            pointer = tl.multiple_of(base.to(tl.pointer_type(y.dtype.element_ty)), 16)
            width = tl.where(used, dim, 0)
            mask = column < width
            value = tl.load(pointer + row * dim + column, mask=mask, other=0.0)
            total += value.to(total.dtype)
        tl.store(
            y + token.to(tl.int64) * dim + column, total.to(y.dtype.element_ty), mask=column < dim
        )
