"""A stable sort of slots by expert in three launches: count by blocks, add up, place. No atomics, no host.

Bucket E, after the experts, takes dropped slots. Within a block of slots each is compared with every other. Numbers that
change from step to step are not specialised, here and elsewhere, or each new kind of them would compile anew.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _bucket(ids, slot, slots, num_experts):
    value = tl.load(ids + slot, mask=slot < slots, other=0).to(tl.int32)
    return tl.where(slot < slots, tl.minimum(value, num_experts), num_experts + 1)


@triton.jit(do_not_specialize=["slots"])
def count_blocks(
    ids,
    counts,
    slots,
    num_experts,
    SLOTS: tl.constexpr,
    BUCKETS: tl.constexpr,
):
    """Write counts [blocks, E + 1]: how many of a block's slots go to each bucket."""
    block = tl.program_id(0)
    bucket = _bucket(ids, block * SLOTS + tl.arange(0, SLOTS), slots, num_experts)
    for first in range(0, num_experts + 1, BUCKETS):
        e = first + tl.arange(0, BUCKETS)
        found = tl.sum((bucket[:, None] == e[None, :]).to(tl.int32), 0)
        tl.store(counts + block * (num_experts + 1) + e, found, mask=e <= num_experts)


@triton.jit(do_not_specialize=["blocks"])
def add_up_blocks(
    counts,
    totals,
    blocks,
    num_experts,
    BLOCKS: tl.constexpr,
    BUCKETS: tl.constexpr,
):
    """Replace counts [blocks, E + 1] by the sum over the blocks before; write totals [E + 1]."""
    e = tl.program_id(0) * BUCKETS + tl.arange(0, BUCKETS)
    carried = tl.zeros([BUCKETS], tl.int32)
    for first in range(0, blocks, BLOCKS):
        block = first + tl.arange(0, BLOCKS)
        mask = (block < blocks)[:, None] & (e <= num_experts)[None, :]
        pointers = counts + block[:, None] * (num_experts + 1) + e[None, :]
        value = tl.load(pointers, mask=mask, other=0)
        tl.store(pointers, carried[None, :] + tl.cumsum(value, 0) - value, mask=mask)
        carried += tl.sum(value, 0)
    tl.store(totals + e, carried, mask=e <= num_experts)


@triton.jit(do_not_specialize=["slots", "bound"])
def place_slots(
    ids,
    before,
    totals,
    order,
    inverse,
    offsets,
    slots,
    bound,
    num_experts,
    SLOTS: tl.constexpr,
    CHUNK: tl.constexpr,
    EXPERTS: tl.constexpr,
):
    """Write the plan: offsets [E + 1], inverse [N], and order [R] as far as `bound`, which is R, goes."""
    block = tl.program_id(0)
    position = tl.arange(0, SLOTS)
    slot = block * SLOTS + position
    bucket = _bucket(ids, slot, slots, num_experts)
    e = tl.arange(0, EXPERTS)
    total = tl.load(totals + e, mask=e <= num_experts, other=0)
    starts = tl.cumsum(total, 0) - total
    if block == 0:
        tl.store(offsets + e, starts, mask=e <= num_experts)
    first = starts + tl.load(before + block * (num_experts + 1) + e, mask=e <= num_experts, other=0)
    earlier = tl.zeros([SLOTS, CHUNK], tl.int32)  # added up over lanes at the end only
    for chunk in range(0, SLOTS, CHUNK):
        other = chunk + tl.arange(0, CHUNK)
        same = _bucket(ids, block * SLOTS + other, slots, num_experts)[None, :] == bucket[:, None]
        earlier += (same & (other[None, :] < position[:, None])).to(tl.int32)
    rank = tl.sum(earlier, 1)
    row = tl.gather(first, tl.minimum(bucket, EXPERTS - 1), 0) + rank
    tl.store(inverse + slot, row, mask=slot < slots)
    tl.store(order + row, slot, mask=(slot < slots) & (row < bound))
