"""The numbers of a step are fetched from the device in one copy."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from tokenyard import Balance
from tokenyard_train.records.routing import loads_of, routing_stats
from tokenyard_train.records.step_numbers import Fetch, LayerSums, pack

from .balances import balance


def test_fetch_returns_sums_over_ranks():
    layers = [balance([1, 2, 3], [0.5, 0.25, 0.125], 7, 1), balance([4, 5, 6], [1.0, 2.0, 3.0], 8)]
    calls = []

    def two_ranks(x):
        calls.append(x)
        return 2 * x

    loss = torch.tensor(1.5)
    norm = torch.tensor(2.5, dtype=torch.float64)
    tokens = [torch.tensor(70), 80]
    flags = [False, True]
    packed = pack(loss, norm, LayerSums.of(layers), two_ranks, flags, tokens)
    fetched = Fetch(packed, [3, 3], flags, tokens).wait()
    assert (fetched.loss, fetched.grad_norm) == (1.5, 2.5)
    assert (fetched.flags, fetched.counts) == ([False, True], [70, 80])
    assert fetched.balance.counts.tolist() == [[1, 2, 3], [4, 5, 6]]
    assert fetched.balance.prob_sum.tolist() == [[1.0, 0.5, 0.25], [2.0, 4.0, 6.0]]
    assert fetched.balance.z_sum.tolist() == [14, 16]
    assert fetched.balance.dropped.tolist() == [2, 0]
    assert len(calls) == 1
    assert loads_of(fetched.balance)[0].tolist() == pytest.approx([1 / 6, 1 / 3, 1 / 2])


@pytest.mark.parametrize(("flags", "tokens"), [([], []), ([True], [7])])
def test_fetch_without_experts(flags, tokens):
    loss = torch.tensor(1.5)
    packed = pack(loss, loss, None, lambda x: x, flags, tokens)
    assert Fetch(packed, [], flags, tokens).wait() == (1.5, 1.5, None, flags, tokens)


class Transfers(TorchDispatchMode):
    """Counts host syncs: reads of a scalar, and copies from or to the host."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        copies = func is torch.ops.aten._to_copy.default
        moves = copies and kwargs.get("device", args[0].device) != args[0].device
        self.count += moves or func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **kwargs)


def test_numbers_are_packed_without_a_copy_to_the_host():
    """On fake CUDA tensors, so that the test needs no GPU."""
    with FakeTensorMode():
        layers = [
            Balance(
                torch.zeros(8, dtype=torch.int64, device="cuda"),
                torch.zeros((), dtype=torch.int64, device="cuda"),
                torch.zeros(8, device="cuda"),
                torch.zeros((), device="cuda"),
            )
            for _ in range(40)
        ]
        number = torch.zeros((), device="cuda")
        with Transfers() as transfers:
            packed = pack(number, number, LayerSums.of(layers), lambda x: x, (True, False))
        assert (packed.device.type, transfers.count) == ("cuda", 0)


@pytest.mark.gpu
def test_the_host_waits_for_the_numbers_and_for_nothing_else():
    """The GPU is busy before and after the numbers."""
    layers = [balance([1, 2, 3], [0.5, 0.25, 0.125], 7, 1, "cuda") for _ in range(4)]
    number = torch.full((), 1.5, device="cuda")
    stream = torch.cuda.current_stream()
    Fetch(pack(number, number, LayerSums.of(layers), lambda x: x), [3] * 4).wait()  # loads kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.cuda._sleep(200_000_000)
        fetch = Fetch(pack(number, number, LayerSums.of(layers), lambda x: x), [3] * 4)
        assert not stream.query()
        torch.cuda._sleep(200_000_000)
        numbers = fetch.wait()
        routing_stats(numbers.balance, 3, 2, "megablocks")
        assert not stream.query()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert (numbers.loss, numbers.balance.counts[3].tolist()) == (1.5, [1, 2, 3])
