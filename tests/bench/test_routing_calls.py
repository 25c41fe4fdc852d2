"""`bench routing` does not time a wrong backend, and names its fault."""

import pytest
import torch

from tokenyard import Plan
from tokenyard.permutations import TorchPermutation
from tokenyard.routers import TopKRouter
from tokenyard_bench.case import make_case
from tokenyard_bench.routing_calls import permutation_calls, plan_rows, router_calls
from tokenyard_bench.shapes import parse_shape


@pytest.fixture
def case():
    torch.manual_seed(3)
    return make_case(parse_shape("64,16,24,4,2"), "natural", torch.float32, torch.device("cpu"))


class Unstable(TorchPermutation):
    def plan(self, topk_ids, num_experts, rows=None):
        order, inverse, offsets, top_k = super().plan(topk_ids, num_experts, rows)
        order[:2] = order[:2].flip(0)
        return Plan(order, inverse, offsets, top_k)


class Forgetful(TorchPermutation):
    def unpermute(self, rows, plan, topk_weights):
        return super().unpermute(rows, plan, topk_weights * 1.001)


class Second(TopKRouter):
    def choose(self, logits, topk_ids):
        return super().choose(-logits if topk_ids is None else logits, topk_ids)


class Louder(TopKRouter):
    def choose(self, logits, topk_ids):
        ids, weights = super().choose(logits, topk_ids)
        return ids, weights * 1.001


def test_core_s_backends_are_right(case):
    assert permutation_calls(TorchPermutation(case.workload), plan_rows(case), case)[1] is None
    assert router_calls(TopKRouter, case)[1] is None


WRONG = [(Unstable, "the plan is not the stable sort"), (Forgetful, "y is off")]


@pytest.mark.parametrize(("permutation", "fault"), WRONG)
def test_wrong_permutations(case, permutation, fault):
    assert permutation_calls(permutation(case.workload), plan_rows(case), case)[1].startswith(fault)


@pytest.mark.parametrize("router", [Second, Louder])
def test_wrong_routers(case, router):
    assert router_calls(router, case)[1].startswith("best weights is off by")
