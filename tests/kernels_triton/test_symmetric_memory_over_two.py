"""The exchange `symmetric_memory` over two ranks: the kit, its buffers and its host reads."""

from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from tokenyard import BackendError, ConfigError, MoE, Routing, Workload, peer_memory
from tokenyard.count import saved_by_ffn
from tokenyard.permutations import TorchPermutation
from tokenyard.recompute import recomputed
from tokenyard.testing import ExchangeConformance, ranks
from tokenyard_kernels_triton.symmetric_memory import SymmetricMemoryExchange, _buffer

EXPERTS = 8
TOP_K = 2


class TestSymmetricMemory(ExchangeConformance):
    backend = "symmetric_memory"


class TestSymmetricMemoryWithLowBound(ExchangeConformance):
    """Most routings have more slots on one rank: its experts compute again."""

    backend = "symmetric_memory"
    options = {"slots": 1}


def make_exchange(slots=1.5, group=None, device="cpu"):
    device = torch.device(device)
    workload = Workload(8, 12, EXPERTS, TOP_K, expert_parallel=2, device=device)
    group = group or dist.group.WORLD
    return SymmetricMemoryExchange(workload, TorchPermutation(workload), group, slots)


def make_routing(tokens, device="cpu", width=8):
    generator = torch.Generator().manual_seed(dist.get_rank())
    x = torch.randn(tokens, width, generator=generator).to(device).requires_grad_()
    weights = torch.rand(tokens, TOP_K, generator=generator).to(device).requires_grad_()
    ids = torch.rand(tokens, EXPERTS, generator=generator).topk(TOP_K).indices.int().to(device)
    return x, Routing(ids, weights, weights)


def compute(rows, ids, weights, bound=None):
    """An expert multiplies its token by its weight, so y is the token times its weights' sum."""
    return rows * weights.sum(1, keepdim=True)


def worst_error(calls, device):
    """Exchange `calls[i][rank]` tokens in call i, all backward passes after all forward passes.

    Return the largest difference of y and both gradients.
    """
    exchange = make_exchange(device=device)
    passes = [forward(exchange, tokens, device) for tokens in calls]
    return max(backward_error(*tensors) for tensors in reversed(passes))


def worst_error_of_recompute(calls, selective):
    """As `worst_error`, with each backward pass after its forward pass, which it computes again."""
    exchange = make_exchange(group=dist.new_group())
    layer = recomputed(exchange, selective)
    return max(backward_error(*forward(layer, tokens, "cpu")) for tokens in calls)


def forward(layer, tokens, device):
    x, routing = make_routing(tokens[dist.get_rank()], device)
    return x, routing.topk_weights, layer(x, routing, compute)


def backward_error(x, weights, y):
    dy = torch.randn_like(y)
    dx, dweights = torch.autograd.grad(y, (x, weights), dy)
    total = weights.sum(1, keepdim=True)
    dots = (dy * x).sum(1, keepdim=True).expand_as(dweights)
    pairs = ((y, x * total), (dx, dy * total), (dweights, dots))
    return max(((got - want).abs().max().item() for got, want in pairs if got.numel()), default=0)


CALLS = [(4, 3), (2, 4), (0, 9), (20, 1), (20, 20), (0, 0)]


def test_tokens_of_ranks_may_change():
    """More tokens than in the first call make the buffers larger, on all ranks."""
    assert max(ranks(2).run(worst_error, CALLS, "cpu")) < 1e-5


@pytest.mark.parametrize("selective", [False, True])
def test_tokens_of_ranks_may_change_under_recompute(selective):
    assert max(ranks(2).run(worst_error_of_recompute, CALLS, selective)) < 1e-5


@pytest.mark.multigpu
def test_tokens_of_ranks_may_change_on_gpus():
    calls = CALLS + [(200 + i, 300 - i) for i in range(100)]
    assert max(ranks(2, "cuda").run(worst_error, calls, "cuda")) < 1e-4


def errors_of_two_dtypes():
    """Return the largest error in float32, then in float64, which needs larger buffers."""
    exchange = make_exchange(group=dist.new_group())
    x, routing = make_routing(6)
    total = routing.topk_weights.sum(1, keepdim=True)
    wide = Routing(*(part.double() if part.is_floating_point() else part for part in routing))
    narrow = exchange(x, routing, compute) - x * total
    return [e.abs().max().item() for e in (narrow, exchange(x.double(), wide, compute) - x * total)]


def test_the_dtype_may_change():
    for errors in ranks(2).run(errors_of_two_dtypes):
        assert max(errors) < 1e-6


def events(slots, skewed):
    """Return the calls of `compute`, by their bound of rows, and the host reads of a second call.

    If `skewed`, rank 0 holds all experts of all tokens.
    """
    seen = []
    exchange = make_exchange(slots)
    x, routing = make_routing(20)
    if skewed:
        routing = routing._replace(topk_ids=routing.topk_ids % (EXPERTS // 2))
    exchange(x, routing, compute)

    def seen_compute(rows, ids, weights, bound):
        seen.append(f"compute {bound}")
        return compute(rows, ids, weights)

    tolist = torch.Tensor.tolist

    def seen_tolist(tensor):
        seen.append("read")
        return tolist(tensor)

    with patch.object(torch.Tensor, "tolist", seen_tolist):
        y = exchange(x, routing, seen_compute)
        y.sum().backward()
    return seen


def test_the_host_reads_counts_once_after_it_has_launched_the_experts():
    assert ranks(2).run(events, 1.5, False) == [["compute 60", "read"]] * 2


def test_experts_compute_again_only_on_the_rank_that_has_more_slots_than_the_bound():
    """The first time all slots are dropped, so little is computed."""
    busy, idle = ranks(2).run(events, 1.5, True)
    assert busy == ["compute 60", "read", "compute 80"]
    assert idle == ["compute 60", "read"]


def error_of(fault):
    """Return the error of an exchange in a new group, with a fault on rank 1."""
    faulty = dist.get_rank() == 1
    exchange = make_exchange(group=dist.new_group())
    x, routing = make_routing(2, width=6 if faulty and fault == "width" else 8)
    name = "other" if faulty and fault == "node" else "this"
    with (
        patch.object(peer_memory, "_BOOT", Path("/not there")),
        patch.object(peer_memory.platform, "node", lambda: name),
    ):
        try:
            exchange(x, routing, compute)
        except BackendError as error:
            return str(error)
    return "no error"


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("none", "no error"),
        ("node", "needs all ranks that share experts on one node"),
        ("width", "rank 1 of the exchange's group has tokens of width 6, and rank 0 8"),
    ],
)
def test_ranks_that_disagree_raise_on_every_rank(fault, said):
    errors = ranks(2).run(error_of, fault)
    assert errors[0] == errors[1]
    assert said in errors[0]


def test_without_a_group():
    exchange = SymmetricMemoryExchange(Workload(8, 8, 8, 2, expert_parallel=2), None)
    with pytest.raises(BackendError, match="expert_parallel is 2, and the exchange has no process"):
        exchange(None, None, None)


def predicted_and_real_buffers():
    """Return both numbers of bytes, of float32 and then of float64."""
    exchange = make_exchange(group=dist.new_group())
    sizes = []
    for width, dtype in ((4, torch.float32), (8, torch.float64)):
        x, routing = make_routing(6)
        wide = Routing(routing.topk_ids, routing.topk_weights.to(dtype), routing.logits)
        exchange(x.to(dtype), wide, compute)
        buffer = _buffer._buffer(exchange.group, x.device)
        sizes.append((exchange.buffer_bytes(6, width), buffer.buffers[0].nbytes))
    return sizes


def test_the_buffer_is_as_large_as_predicted():
    for predicted, real in ranks(2).run(predicted_and_real_buffers)[0]:
        assert predicted == real > 0


@pytest.mark.parametrize("slots", [0.5, float("inf"), "2"])
def test_a_bad_bound_is_one_sentence(slots):
    with pytest.raises(ConfigError, match=r"backends.exchange.slots is .*; give a number from 1"):
        SymmetricMemoryExchange(Workload(8, 8, 8, 2, expert_parallel=2), None, None, slots)


def test_the_memory_estimate_has_the_rows_of_the_bound():
    """A kernel saves rows of 2F numbers; a rank receives 2 rows per token, whoever uses them."""

    def saved(slots):
        workload = Workload(8, 16, EXPERTS, TOP_K, expert_parallel=2)
        backends = {"exchange": {"name": "symmetric_memory", "slots": slots}, "experts": "loop"}
        with torch.device("meta"):
            return saved_by_ffn(MoE(workload, backends=backends), width=4)

    assert saved(1.5) - saved(1) == 4 * 1 * 2 * 16
    assert saved(9) == saved(2)
