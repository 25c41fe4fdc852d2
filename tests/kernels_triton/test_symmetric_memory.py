"""The copies of the exchange `symmetric_memory`: kernels do what plain torch does."""

import time
from itertools import count

import pytest
import torch
import torch.distributed as dist

from tokenyard import Workload
from tokenyard_kernels_triton.symmetric_memory import (
    SymmetricMemoryExchange,
    _torch_copies,
    _triton_copies,
)
from tokenyard_kernels_triton.symmetric_memory._late_read import LateRead, wait_for_tokens
from tokenyard_kernels_triton.symmetric_memory._region import Region, Sizes, layout_of

RANKS, CAPACITY, TOP_K, HELD = 3, 5, 3, 2
KEYS = count(-1, -1)  # of regions that a link does not have
TOKENS = (5, 0, 7)  # rank 1 has none, and rank 2 more than fit


def regions(sizes, start):
    """Return the region of each rank, all in this process; what nobody wrote is NaN."""
    size = start + layout_of(sizes).bytes
    device = "cuda" if torch.cuda.is_available() else "cpu"
    buffers = tuple(torch.full((size,), 255, dtype=torch.uint8, device=device) for _ in TOKENS)
    addresses = torch.tensor([buffer.data_ptr() for buffer in buffers], device=device)
    return [Region(next(KEYS), sizes, rank, start, buffers, addresses) for rank in range(RANKS)]


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
    received = [copies.pull_tokens(region, own, bound=5) for region, own in zip(there, x)]
    again = [copies.pull_rows(region, own, got[2]) for region, own, got in zip(there, x, received)]

    back = regions(sizes, start=0)
    computed = [(rank + 1) * rows for rank, (rows, *_) in enumerate(received)]
    for region, y, (_, dots, here, *_) in zip(back, computed, received):
        copies.publish_rows(region, y, dots, here)
    sums = [
        [part[:CAPACITY] for part in copies.sum_rows(region, y, dots, own_ids)]
        for region, y, (_, dots, *_), own_ids in zip(back, computed, received, ids)
    ]
    for region, y, (_, _, here, *_) in zip(back, computed, received):
        copies.publish_rows(region, y, None, here)
    alone = [
        copies.sum_rows(region, y, None, own_ids)[0][:CAPACITY]
        for region, y, own_ids in zip(back, computed, ids)
    ]
    for region, y in zip(there, x):
        copies.publish_tokens(region, 2 * y)
    gradients = [
        copies.pull_rows(region, 2 * y, got[2]) for region, y, got in zip(there, x, received)
    ]
    return received, again, sums, alone, gradients, (x, weights, ids)


@pytest.mark.parametrize(("dim", "dtype"), [(40, torch.float16), (2051, torch.float32)], ids=str)
def test_kernels_copy_what_torch_copies(dim, dtype):
    *want, _ = trips(_torch_copies, dim, dtype)
    for _ in range(3):  # launched, recorded, replayed
        *got, _ = trips(_triton_copies, dim, dtype)
        flat_want, flat_got = (torch.utils._pytree.tree_leaves(values) for values in (want, got))
        assert len(flat_want) == len(flat_got) == 15 + 3 + 6 + 3 + 3
        for a, b in zip(flat_want, flat_got):
            torch.testing.assert_close(b, a, rtol=0, atol=0)


def test_every_slot_arrives_once_and_returns():
    received, _, sums, *_, (x, weights, ids) = trips(_torch_copies, 4, torch.float32)
    for source, tokens in enumerate(TOKENS):
        for token in range(min(tokens, CAPACITY)):
            row = source * CAPACITY + token
            total = torch.zeros_like(x[source][token])
            for rank, (rows, weights_here, here, *_) in enumerate(received):
                local = ids[source][token] - rank * HELD
                held = (local >= 0) & (local < HELD)
                assert torch.equal(here[row], torch.where(held, local, HELD))
                assert torch.equal(weights_here[row], weights[source][token] * held)
                assert torch.equal(rows[row], x[source][token] * held.any())
                total += (rank + 1) * x[source][token] * held.any()
            kept = ids[source][token] < RANKS * HELD
            assert torch.equal(sums[source][0][token], total)
            assert torch.equal(sums[source][1][token], weights[source][token] * kept)


def test_more_slots_than_the_bound_are_all_dropped_in_the_bounded_ids():
    received, *_, (_, _, ids) = trips(_torch_copies, 4, torch.float32)
    for _, _, here, bounded, status in received:
        assert status[:RANKS].tolist() == list(TOKENS)
        assert status[RANKS] == (here < HELD).sum()
        assert torch.equal(bounded, here if status[RANKS] <= 5 else torch.full_like(here, HELD))
    slots = [int(status[RANKS]) for *_, status in received]
    assert min(slots) <= 5 < max(slots)
    assert sum(slots) == sum((own[:CAPACITY] < RANKS * HELD).sum() for own in ids)


def test_the_host_waits_for_the_tokens_of_a_rank_that_hangs_until_the_timeout():
    """The supervisor names the function that raises; CUDA alone would wait for ever."""
    answers = iter([False] * 100 + [True])
    wait_for_tokens(lambda: next(answers), timeout=30)
    assert list(answers) == []
    began = time.monotonic()
    with pytest.raises(dist.DistError, match="of all ranks did not arrive in") as error:
        wait_for_tokens(lambda: False, timeout=0.3)
    assert 0.3 <= time.monotonic() - began < 10
    assert error.traceback[-1].name == "wait_for_tokens"


@pytest.mark.gpu
def test_a_read_waits_for_what_came_before_its_mark_and_no_longer():
    late = LateRead(timeout=30)
    numbers = torch.zeros(3, dtype=torch.int32, device="cuda")
    late.mark(numbers)
    late.read(numbers)  # the first copy allocates pinned memory, which waits for the GPU
    for value in (1, 2):
        torch.cuda._sleep(100_000_000)  # cycles, about 50 ms
        numbers = numbers + 1
        late.mark(numbers)
        done = torch.cuda.Event()
        torch.cuda._sleep(4_000_000_000)
        done.record()
        assert late.read(numbers) == [value] * 3
        assert not done.query()
    late.timeout = 0.2
    late.mark(numbers)
    with pytest.raises(dist.DistError, match="of all ranks did not arrive"):
        late.read(numbers)


def test_the_bytes_that_peers_read_of_a_token():
    """It goes there and back, with two ids and half of its two weights."""
    workload = Workload(8, 4, 8, 2, expert_parallel=2)
    exchange = SymmetricMemoryExchange(workload, None)
    row = 2 * 8
    travels = 1 - 6 / 28  # 6 of 28 pairs of experts are on the token's own rank
    assert exchange.sent_bytes_per_token(2) == round(travels * 2 * row + 2 * 4 / 2 + 2 * 4)
