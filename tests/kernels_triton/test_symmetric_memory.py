"""The copies of the exchange `symmetric_memory`: kernels do what plain torch does."""

import pytest
import torch

from tokenyard_kernels_triton.symmetric_memory import _torch_copies, _triton_copies
from tokenyard_kernels_triton.symmetric_memory._region import Layout, Region, Sizes

RANKS, CAPACITY, TOP_K, HELD = 3, 5, 3, 2
TOKENS = (5, 0, 7)  # rank 1 has none, and rank 2 more than fit
GARBAGE = float("nan")


def regions(sizes, start):
    """Return the region of each rank, all in this process; what nobody wrote is NaN."""
    size = start + Layout(sizes).bytes
    device = "cuda" if torch.cuda.is_available() else "cpu"
    buffers = tuple(torch.full((size,), 255, dtype=torch.uint8, device=device) for _ in TOKENS)
    addresses = torch.tensor([buffer.data_ptr() for buffer in buffers], device=device)
    return [Region(sizes, rank, start, buffers, addresses) for rank in range(RANKS)]


def trips(copies, dim, dtype):
    """Send tokens to the experts of all ranks and back; return all results of all ranks."""
    generator = torch.Generator().manual_seed(0)
    sizes = Sizes(RANKS, CAPACITY, dim, TOP_K, HELD, dtype, torch.float32)

    def random(*shape):
        values = torch.randn(shape, generator=generator)
        return values.to("cuda" if torch.cuda.is_available() else "cpu")

    there = regions(sizes, start=256)
    x = [random(tokens, dim).to(dtype) for tokens in TOKENS]
    weights = [random(tokens, TOP_K) for tokens in TOKENS]
    # two of the ids are of no expert, and so dropped
    ids = [random(tokens, RANKS * HELD + 2).topk(TOP_K).indices.int() for tokens in TOKENS]
    for region, *tensors in zip(there, x, ids, weights):
        copies.publish_tokens(region, *tensors)
    received = [copies.pull_routing(region) for region in there]
    rows = [
        copies.pull_rows(region, own, here) for region, own, (here, *_) in zip(there, x, received)
    ]
    bounded = [
        [copies.bound_ids(here, status[RANKS:], bound, HELD) for bound in (5, 6)]
        for here, _, status in received
    ]

    back = regions(sizes, start=0)
    computed = [(rank + 1) * rows_here for rank, rows_here in enumerate(rows)]
    for region, y, (here, dots, _) in zip(back, computed, received):
        copies.publish_rows(region, y, dots, here)
    sums = [
        copies.sum_rows(region, y, dots, own_ids)
        for region, y, (_, dots, _), own_ids in zip(back, computed, received, ids)
    ]
    sums = [(y[:CAPACITY], dots[:CAPACITY]) for y, dots in sums]
    for region, y, (here, *_) in zip(back, computed, received):
        copies.publish_rows(region, y, None, here)
    alone = [
        copies.sum_rows(region, y, None, own_ids)[0][:CAPACITY]
        for region, y, own_ids in zip(back, computed, ids)
    ]
    return received, rows, bounded, sums, alone, (x, weights, ids)


@pytest.mark.parametrize(("dim", "dtype"), [(40, torch.float16), (2051, torch.float32)], ids=str)
def test_kernels_copy_what_torch_copies(dim, dtype):
    *want, _ = trips(_torch_copies, dim, dtype)
    *got, _ = trips(_triton_copies, dim, dtype)
    flat_want, flat_got = (torch.utils._pytree.tree_leaves(values) for values in (want, got))
    assert len(flat_want) == len(flat_got) == 9 + 3 + 6 + 6 + 3
    for a, b in zip(flat_want, flat_got):
        torch.testing.assert_close(b, a, rtol=0, atol=0)


def test_every_slot_arrives_once_and_returns():
    received, rows, _, sums, _, (x, weights, ids) = trips(_torch_copies, 4, torch.float32)
    for source, count in enumerate(TOKENS):
        for token in range(min(count, CAPACITY)):
            row = source * CAPACITY + token
            total = torch.zeros_like(x[source][token])
            for rank, (here, weights_here, _) in enumerate(received):
                local = ids[source][token] - rank * HELD
                held = (local >= 0) & (local < HELD)
                assert torch.equal(here[row], torch.where(held, local, HELD))
                assert torch.equal(weights_here[row], weights[source][token] * held)
                assert torch.equal(rows[rank][row], x[source][token] * held.any())
                total += (rank + 1) * x[source][token] * held.any()
            kept = ids[source][token] < RANKS * HELD
            assert torch.equal(sums[source][0][token], total)
            assert torch.equal(sums[source][1][token], weights[source][token] * kept)
    for _, _, status in received:
        assert status[:RANKS].tolist() == list(TOKENS)
    assert sum(status[RANKS] for _, _, status in received) == sum(
        (own[:CAPACITY] < RANKS * HELD).sum() for own in ids
    )
