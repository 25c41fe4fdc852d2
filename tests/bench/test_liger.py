"""Liger's fused layer as a peer. Its packages are replaced by their interface in plain torch."""

import sys
from dataclasses import replace
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from tokenyard_bench.case import make_case
from tokenyard_bench.exchange import liger
from tokenyard_bench.exchange.entrant import judge_rank
from tokenyard_bench.exchange.liger import Capacity, liger_candidate
from tokenyard_bench.exchange.rank_case import part_of
from tokenyard_bench.shapes import Shape

SHAPE = Shape("", 70, 24, 40, 6, 2)
CAPACITY = Capacity(128, 48, 6, 2)


def moe_fused(x, ids, weights, gate, up, down, num_experts, top_k):
    """x [T, D], ids and weights [T, K], gate and up [E, F, D], down [E, D, F]."""
    assert ids.dtype == torch.int32
    assert weights.dtype == x.dtype == torch.bfloat16
    a = F.silu(torch.einsum("td,efd->tef", x, gate)) * torch.einsum("td,efd->tef", x, up)
    rows = torch.einsum("tef,edf->ted", a, down)
    picked = rows.gather(1, ids.long().unsqueeze(-1).expand(-1, -1, x.shape[1]))
    return (weights.unsqueeze(-1) * picked).sum(1)


@pytest.fixture
def reserved(monkeypatch):
    """Install Liger; return the capacities that it has reserved."""
    reserved = []
    names = ["liger_kernel", "liger_cute_kernels"]
    names += [f"liger_kernel.ops{name}" for name in ("", ".cute", ".cute.ops", ".cute.ops.moe")]
    for name in names:
        module = ModuleType(name)
        module.__spec__ = SimpleNamespace()
        module.__path__ = []
        monkeypatch.setitem(sys.modules, name, module)
    sys.modules["liger_kernel.ops.cute.ops.moe"].moe_fused = moe_fused
    cute = sys.modules["liger_cute_kernels"]
    cute.MoEConfig = lambda **sizes: sizes
    cute.configure = lambda moe: reserved.append(moe)
    monkeypatch.setenv("LIGER_KERNEL_IMPL", "cute")
    liger._reserve.cache_clear()
    yield reserved
    liger._reserve.cache_clear()


def case(dtype=torch.bfloat16, activation="swiglu", capability=(9, 0)):
    """One rank's case on the CPU that claims to be for a Hopper GPU."""
    torch.manual_seed(2)
    part = part_of(make_case(SHAPE, "natural", dtype, torch.device("cpu"), activation), 0, 1)
    return replace(part, workload=replace(part.workload, capability=capability))


def test_its_results_are_compared_in_the_order_of_our_rows(reserved):
    tried = case()
    for _ in range(2):
        candidate = liger_candidate(tried, CAPACITY)
        assert candidate.unusable is None
        entrant = candidate.build()
    results = entrant.results()
    assert [results[name].shape for name in ("d weights", "d up")] == [(70, 2), (6, 80, 24)]
    verdict = judge_rank(tried, results)
    assert verdict.error <= 2 * verdict.allowed
    # the largest layer of the run, once: the buffers cannot grow
    sizes = {"max_tokens": 128, "hidden_size": 48, "num_experts": 6, "top_k": 2}
    assert reserved == [sizes | {"num_hosts": 1, "gpus_per_host": 1}]


def test_a_wrong_gradient_is_found(reserved):
    tried = case()
    results = liger_candidate(tried, CAPACITY).build().results()
    for name in results:
        verdict = judge_rank(tried, results | {name: 1.1 * results[name]})
        assert verdict.worst == name
        assert verdict.error > 2 * verdict.allowed


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"capability": (8, 0)}, "is for Hopper and Blackwell GPUs"),
        ({"dtype": torch.float32}, "computes in bf16"),
        ({"activation": "geglu"}, "computes swiglu, not geglu"),
    ],
)
def test_what_it_cannot_run(reserved, changes, sentence):
    assert sentence in liger_candidate(case(**changes), CAPACITY).unusable


def test_too_many_tokens_for_its_buffer(reserved):
    many = CAPACITY._replace(tokens=2**30)
    sentence = "holds 2,147,483,647 slots, and --tokens 1,073,741,824 needs 2,147,484,416; lower"
    assert sentence in liger_candidate(case(), many).unusable


def test_without_it_the_row_says_where_it_is():
    assert "https://github.com/linkedin/Liger-Kernel" in liger_candidate(case(), CAPACITY).unusable
