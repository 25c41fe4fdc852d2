"""A stable sort of slots by expert in three launches: count by block, add up, place.

It needs no atomics and no host sync. Bucket E, after the experts, takes dropped slots. Within a
block every slot is compared with every other.

Numbers that change from step to step are not specialized (``do_not_specialize``), so that no new
value compiles a kernel again. The other modules do the same.
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
    ids,  # [N]
    counts,  # [blocks, E + 1]
    slots,  # N
    num_experts,  # E
    SLOTS: tl.constexpr,
    BUCKETS: tl.constexpr,
):
    """Write the number of slots of each block in each bucket; one program per block of SLOTS."""
    block = tl.program_id(0)
    bucket = _bucket(ids, block * SLOTS + tl.arange(0, SLOTS), slots, num_experts)  # [SLOTS]
    for first in range(0, num_experts + 1, BUCKETS):
        e = first + tl.arange(0, BUCKETS)
        count = tl.sum((bucket[:, None] == e[None, :]).to(tl.int32), 0)  # [BUCKETS]
        tl.store(counts + block * (num_experts + 1) + e, count, mask=e <= num_experts)


@triton.jit(do_not_specialize=["blocks"])
def add_up_blocks(
    counts,  # [blocks, E + 1]
    totals,  # [E + 1]
    blocks,
    num_experts,  # E
    BLOCKS: tl.constexpr,
    BUCKETS: tl.constexpr,
):
    """Replace each count by the sum over the blocks before it, and write each bucket's total."""
    e = tl.program_id(0) * BUCKETS + tl.arange(0, BUCKETS)
    carried = tl.zeros([BUCKETS], tl.int32)
    for first in range(0, blocks, BLOCKS):
        block = first + tl.arange(0, BLOCKS)
        mask = (block < blocks)[:, None] & (e <= num_experts)[None, :]
        pointers = counts + block[:, None] * (num_experts + 1) + e[None, :]
        value = tl.load(pointers, mask=mask, other=0)  # [BLOCKS, BUCKETS]

        # An exclusive sum: without the block's own count.
        tl.store(pointers, carried[None, :] + tl.cumsum(value, 0) - value, mask=mask)
        carried += tl.sum(value, 0)
    tl.store(totals + e, carried, mask=e <= num_experts)


@triton.jit(do_not_specialize=["slots", "bound"])
def place_slots(
    ids,  # [N]
    before,  # [blocks, E + 1], from add_up_blocks
    totals,  # [E + 1]
    order,  # [R]
    inverse,  # [N]
    offsets,  # [E + 1]
    slots,  # N
    bound,  # R
    num_experts,  # E
    SLOTS: tl.constexpr,
    CHUNK: tl.constexpr,
    EXPERTS: tl.constexpr,
):
    """Write the plan: offsets, inverse, and the first `bound` entries of order."""
    block = tl.program_id(0)
    position = tl.arange(0, SLOTS)
    slot = block * SLOTS + position
    bucket = _bucket(ids, slot, slots, num_experts)  # [SLOTS]

    # The first row of each bucket, then the first row of its slots in this block.
    e = tl.arange(0, EXPERTS)
    total = tl.load(totals + e, mask=e <= num_experts, other=0)  # [EXPERTS]
    starts = tl.cumsum(total, 0) - total
    if block == 0:
        tl.store(offsets + e, starts, mask=e <= num_experts)
    first = starts + tl.load(before + block * (num_experts + 1) + e, mask=e <= num_experts, other=0)

    # Rank of each slot in its bucket and block, CHUNK slots at a time. Lanes are summed at the end.
    earlier = tl.zeros([SLOTS, CHUNK], tl.int32)
    for chunk in range(0, SLOTS, CHUNK):
        other = chunk + tl.arange(0, CHUNK)
        same = _bucket(ids, block * SLOTS + other, slots, num_experts)[None, :] == bucket[:, None]
        earlier += (same & (other[None, :] < position[:, None])).to(tl.int32)
    rank = tl.sum(earlier, 1)  # [SLOTS]
    row = tl.gather(first, tl.minimum(bucket, EXPERTS - 1), 0) + rank
    tl.store(inverse + slot, row, mask=slot < slots)
    tl.store(order + row, slot, mask=(slot < slots) & (row < bound))


@triton.jit(do_not_specialize=["slots", "bound"])
def plan_at_once(
    ids,  # [N]
    order,  # [R]
    inverse,  # [N]
    offsets,  # [E + 1]
    slots,  # N
    bound,  # R
    num_experts,  # E
    SLOTS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Write the plan of few slots in one launch: each of SLOTS slots is compared with all others.

    The same programs count the slots before each of SLOTS experts.
    """
    position = tl.program_id(0) * SLOTS + tl.arange(0, SLOTS)  # slots, and experts
    key = _bucket(ids, position, slots, num_experts) * slots + position  # [SLOTS]
    before_slot = tl.zeros([SLOTS, CHUNK], tl.int32)
    before_expert = tl.zeros([SLOTS, CHUNK], tl.int32)
    for first in range(0, slots, CHUNK):
        other = first + tl.arange(0, CHUNK)
        bucket = _bucket(ids, other, slots, num_experts)  # [CHUNK]
        other_key = tl.where(other < slots, bucket * slots + other, 2147483647)
        before_slot += (other_key[None, :] < key[:, None]).to(tl.int32)
        before_expert += (bucket[None, :] < position[:, None]).to(tl.int32)
    row = tl.sum(before_slot, 1)
    tl.store(inverse + position, row, mask=position < slots)
    tl.store(order + row, position, mask=(position < slots) & (row < bound))
    tl.store(offsets + position, tl.sum(before_expert, 1), mask=position <= num_experts)
