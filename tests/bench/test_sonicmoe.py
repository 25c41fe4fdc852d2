"""SonicMoE as a peer. Its package is replaced by its published interface in plain torch."""

import sys
from dataclasses import replace
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from tokenyard_bench.case import make_case
from tokenyard_bench.entrant import SkippedEntrant
from tokenyard_bench.entrants import peer_entrants
from tokenyard_bench.oracle import judge
from tokenyard_bench.shapes import Shape

SHAPE = Shape("", 70, 24, 40, 6, 2)


def select(logits, experts, top_k):
    values, ids = logits.topk(top_k, -1)
    return values.softmax(-1), ids.int()


def layer(x, router, w1, b1, w2, b2, top_k, stream, activation, inference):
    """w1 [2F, D, E] has the rows of gate and up in turns; w2 is [D, F, E]."""
    logits = x @ router.T
    scores, ids = select(logits, router.shape[0], top_k)
    z = torch.einsum("td,fde->tef", x, w1)
    rows = torch.einsum("tef,dfe->ted", F.silu(z[..., ::2]) * z[..., 1::2], w2)
    picked = rows.gather(1, ids.long().unsqueeze(-1).expand(-1, -1, x.shape[1]))
    return (scores.unsqueeze(-1) * picked).sum(1), logits, None


@pytest.fixture
def installed(monkeypatch):
    functional, enums = ModuleType("sonicmoe.functional"), ModuleType("sonicmoe.enums")
    functional.moe_TC_softmax_topk_layer = layer
    functional.TC_Softmax_Topk_Router_Function = SimpleNamespace(apply=select)
    enums.ActivationType = SimpleNamespace(SWIGLU="swiglu")
    for module in (ModuleType("sonicmoe"), functional, enums):
        module.__spec__ = SimpleNamespace()
        monkeypatch.setitem(sys.modules, module.__name__, module)
    stream = SimpleNamespace(cuda_stream=0)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)


def case(routing="natural", dtype=torch.bfloat16, activation="swiglu"):
    """A case on the CPU that claims to be for a Hopper GPU."""
    made = make_case(SHAPE, routing, dtype, torch.device("cpu"), activation)
    return replace(made, workload=replace(made.workload, capability=(9, 0)))


def sonicmoe(case):
    (entrant,) = peer_entrants(case, "sonicmoe")
    return entrant


def test_its_results_are_compared_in_the_order_of_our_rows(installed):
    tried = case()
    entrant = sonicmoe(tried)
    verdict = judge(tried, entrant)
    assert verdict.error <= 2 * verdict.allowed
    assert verdict.allowed < 0.1
    forward, rest = entrant.stages(tried, microbatches=2)
    rest(forward(None))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"routing": "uniform"}, "selects experts itself, and --routing uniform sets them"),
        ({"dtype": torch.float32}, "computes in bf16 and fp16"),
        ({"activation": "geglu"}, "computes swiglu, not geglu"),
    ],
)
def test_what_it_cannot_run(installed, changes, sentence):
    skipped = sonicmoe(case(**changes))
    assert isinstance(skipped, SkippedEntrant)
    assert sentence in skipped.reason


def test_without_it_the_row_says_where_it_is():
    assert "https://github.com/Dao-AILab/sonic-moe" in sonicmoe(case()).reason
