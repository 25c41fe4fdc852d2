"""The kernels pass core's kit on a CPU: the same CUDA sources, emulated, threads in any order."""

from dataclasses import replace

import emulated
import pytest
import torch

from tokenyard import RoutingRule, Workload
from tokenyard.permutations import TorchPermutation
from tokenyard.testing import PermutationConformance, TopKRouterConformance
from tokenyard.testing import _router_oracle as oracle
from tokenyard.testing._compare import assert_close
from tokenyard.tolerance import relative_error
from tokenyard_kernels_cuda.ops._logits import logits_backward_op, logits_op
from tokenyard_kernels_cuda.ops._plan import MOST_EXPERTS
from tokenyard_kernels_cuda.ops._topk import route, weigh
from tokenyard_kernels_cuda.permutation import CudaPermutation

pytestmark = [pytest.mark.usefixtures("emulation"), pytest.mark.xdist_group("emulated")]


class TestPermutation(PermutationConformance):
    backend = "cuda"
    device = "cpu"

    def registry(self):
        return emulated.registry()


@pytest.mark.full
class TestPermutationOfOddRows(TestPermutation):
    dim = 15


class TestRouter(TopKRouterConformance):
    backend = "cuda"
    device = "cpu"

    def registry(self):
        return emulated.registry()


@pytest.mark.full
class TestRouterOfManyExperts(TestRouter):
    num_experts, top_k = 72, 9


def cuda_permutation(dtype=torch.float32):
    return CudaPermutation(Workload(8, 8, 2, 1, dtype=dtype))


@pytest.mark.parametrize(
    ("tokens", "experts", "top_k"),
    [
        (3000, 16, 4),
        (1, 1, 1),
        (1024, 4, 1),
        (2049, 128, 8),
        (700, 1500, 3),
        (900, MOST_EXPERTS, 2),
    ],
)
def test_plans_of_many_blocks(tokens, experts, top_k):
    """As core's, exactly: blocks add up what others counted, and the more experts, the fewer warps."""
    ids = torch.randint(0, experts + 1, (tokens, top_k), dtype=torch.int32)
    rows = int((ids < experts).sum())
    got, want = (p.plan(ids, experts, rows) for p in (cuda_permutation(), TorchPermutation(None)))
    assert torch.equal(got.offsets, want.offsets)
    assert torch.equal(got.order, want.order)
    kept = want.inverse < rows
    assert torch.equal(got.inverse[kept], want.inverse[kept])
    assert (got.inverse[~kept] >= rows).all()
    assert torch.equal(got.inverse.sort().values, torch.arange(ids.numel(), dtype=torch.int32))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("dim", [2056, 2051])
def test_wide_rows(dim, dtype):
    """A row of more than a block's threads, whole packs or not, and x as a part of another tensor."""
    ids = torch.randint(0, 9, (5, 3), dtype=torch.int32)  # 8 drops
    x, dy = torch.randn(5 * dim + 1, dtype=dtype)[1:].view(5, dim), torch.randn(5, dim, dtype=dtype)
    weights = torch.rand(5, 3)

    def there_and_back(permutation, dtype):
        x_, w = (
            x.to(dtype).requires_grad_(),
            weights.to(torch.promote_types(dtype, torch.float32)).requires_grad_(),
        )
        plan = permutation.plan(ids, 8)
        y = permutation.unpermute(permutation.permute(x_, plan), plan, w)
        dx, dw = torch.autograd.grad(y, (x_, w), dy.to(dtype))
        return {"y": y, "d x": dx, "d weights": dw}

    plain, exact = (there_and_back(TorchPermutation(None), d) for d in (dtype, torch.float64))
    assert_close(there_and_back(cuda_permutation(dtype), dtype), plain, exact)


@pytest.mark.parametrize(("experts", "top_k"), [(33, 33), (1000, 5), (1024, 1024)])
def test_routes_to_many_experts(experts, top_k):
    """Up to all of them, which leaves room for fewer warps."""
    rule = RoutingRule(normalize=1.5, num_groups=experts if top_k == experts else 1, groups_kept=1)
    rule = replace(rule, groups_kept=rule.num_groups)
    logits = torch.randn(3, experts).round(decimals=1)  # some are equal
    ids, weights = route(logits, None, top_k, rule)
    assert ids.tolist() == oracle.select(logits, None, rule, top_k)
    assert relative_error(weights, oracle.weigh(logits.double(), ids.long(), rule)) < 1e-6


def test_zeros_of_either_sign_are_equal():
    logits = torch.tensor([[0.0, -0.0, 0.0, -1.0], [-0.0, 0.0, -1.0, -0.0]])
    ids, _ = route(logits, None, 3, RoutingRule(select_first=True))
    assert ids.tolist() == [[0, 1, 2], [0, 1, 3]]


def test_one_group_is_kept():
    """Of equal ones the first."""
    rule = RoutingRule(select_first=True, num_groups=6, groups_kept=1)
    logits = torch.randn(64, 12)
    logits[0] = torch.tensor([1.0, 0.0] * 6)
    ids, _ = route(logits, None, 2, rule)
    assert ids.tolist() == oracle.select(logits, None, rule, 2)
    assert ids[0].tolist() == [0, 1]


def test_gradients_say_that_they_cannot_be_differentiated_again():
    """A wrong number would be worse: what computes them has no gradient of its own."""
    rows, weights = torch.randn(12, 8, requires_grad=True), torch.rand(6, 2, requires_grad=True)
    moved = CudaPermutation(None)
    y = moved.unpermute(rows, moved.plan(torch.rand(6, 4).topk(2).indices, 4), weights)
    torch.autograd.grad(y.sum(), (rows, weights), retain_graph=True)
    with pytest.raises(RuntimeError, match="gradients of 'cuda' cannot be differentiated"):
        torch.autograd.grad(y.sum(), (rows, weights), create_graph=True)


@pytest.mark.parametrize("shape", [(2, 2), (4, 3, 2)])
def test_ids_that_are_not_of_these_tokens_are_refused(shape):
    with pytest.raises(
        ValueError, match=r"topk_ids is \[.*\], and there are 12 tokens; give ids \[T, K\]"
    ):
        weigh(torch.randn(12, 8), torch.zeros(shape, dtype=torch.int32), RoutingRule())


def test_a_plan_of_other_tokens_is_refused():
    moved = CudaPermutation(None)
    plan = moved.plan(torch.zeros(6, 2, dtype=torch.int32), 4)
    with pytest.raises(
        ValueError, match="x has 5 tokens and the plan 12 slots; there must be 2 a token"
    ):
        moved.permute(torch.randn(5, 8), plan)


def test_logits_of_rows_that_lie_crosswise_are_as_their_fakes_say():
    x, weight = (
        torch.randn(8, 12).bfloat16().t().requires_grad_(),
        torch.randn(4, 8).bfloat16().requires_grad_(),
    )
    torch.library.opcheck(logits_op, (x, weight))
    torch.library.opcheck(
        logits_backward_op, (torch.randn(12, 4), x.detach(), weight.detach(), [True, True])
    )


def test_what_is_not_a_number_stays_so():
    logits = torch.tensor([[1.0, float("nan"), 3.0, 0.0]])
    ids = torch.tensor([[1, 2]], dtype=torch.int32)
    assert weigh(logits, ids, RoutingRule(select_first=True)).isnan().all()


def test_ids_below_0_are_nobody_s():
    logits = torch.randn(3, 8)
    found = weigh(logits, torch.tensor([[-1, 2]] * 3), RoutingRule())
    assert (found[:, 0] == 0).all()


def test_a_selection_bias_may_have_been_cast():
    """By model.to(bfloat16)."""
    bias = torch.tensor([0.0, 0.0, 5.0, 0.0])
    ids = [route(torch.zeros(3, 4), b, 1, RoutingRule())[0] for b in (bias, bias.bfloat16())]
    assert torch.equal(*ids)
