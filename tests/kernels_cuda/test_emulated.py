"""The kernels pass core's conformance kit on the CPU emulator, with threads in random order."""

from dataclasses import replace

import emulated
import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from tokenyard import RoutingRule, Workload
from tokenyard.permutations import TorchPermutation
from tokenyard.testing import PermutationConformance, TopKRouterConformance
from tokenyard.testing import _router_oracle as oracle
from tokenyard.testing._compare import assert_close
from tokenyard.tolerance import relative_error
from tokenyard_kernels_cuda.ops._logits import logits_backward_op, logits_op
from tokenyard_kernels_cuda.ops._plan import MOST_EXPERTS
from tokenyard_kernels_cuda.ops._route_tokens import route_tokens
from tokenyard_kernels_cuda.ops._topk import route, weigh
from tokenyard_kernels_cuda.permutation import CudaPermutation

pytestmark = pytest.mark.usefixtures("emulation")


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
        (1024, 4, 1),  # one block
        (2049, 128, 8),
        (700, 1500, 3),
        (1200, MOST_EXPERTS, 2),
    ],
)
def test_plans_of_many_blocks(tokens, experts, top_k):
    """The plan equals core's. Blocks sum each other's counts; many experts leave fewer warps."""
    ids = torch.randint(0, experts + 1, (tokens, top_k), dtype=torch.int32)
    rows = int((ids < experts).sum())
    got = cuda_permutation().plan(ids, experts, rows)
    want = TorchPermutation(None).plan(ids, experts, rows)
    assert torch.equal(got.offsets, want.offsets)
    assert torch.equal(got.order, want.order)
    live = want.inverse < rows
    assert torch.equal(got.inverse[live], want.inverse[live])
    assert (got.inverse[~live] >= rows).all()
    assert torch.equal(got.inverse.sort().values, torch.arange(ids.numel(), dtype=torch.int32))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("dim", [2056, 2051])
def test_wide_rows(dim, dtype):
    """A row has more packs than a block has threads, aligned or not; x is an unaligned view."""
    ids = torch.randint(0, 9, (5, 3), dtype=torch.int32)  # id 8 is dropped
    x = torch.randn(5 * dim + 1, dtype=dtype)[1:].view(5, dim)
    dy = torch.randn(5, dim, dtype=dtype)
    weights = torch.rand(5, 3)

    def round_trip(permutation, dtype):
        x_ = x.to(dtype).requires_grad_()
        w = weights.to(torch.promote_types(dtype, torch.float32)).requires_grad_()
        plan = permutation.plan(ids, 8)
        y = permutation.unpermute(permutation.permute(x_, plan), plan, w)
        dx, dw = torch.autograd.grad(y, (x_, w), dy.to(dtype))
        return {"y": y, "d x": dx, "d weights": dw}

    plain = round_trip(TorchPermutation(None), dtype)
    exact = round_trip(TorchPermutation(None), torch.float64)
    assert_close(round_trip(cuda_permutation(dtype), dtype), plain, exact)


@pytest.mark.parametrize(("experts", "top_k"), [(33, 33), (1000, 5), (1024, 1024)])
def test_routes_to_many_experts(experts, top_k):
    """Up to K = E = 1024, where shared memory fits fewer warps."""
    rule = RoutingRule(normalize=1.5, num_groups=experts if top_k == experts else 1, groups_kept=1)
    rule = replace(rule, groups_kept=rule.num_groups)
    logits = torch.randn(3, experts).round(decimals=1)  # has ties
    ids, weights = route(logits, None, top_k, rule)
    assert ids.tolist() == oracle.select(logits, None, rule, top_k)
    assert relative_error(weights, oracle.weigh(logits.double(), ids.long(), rule)) < 1e-6


@pytest.mark.parametrize(
    "rule",
    [
        RoutingRule(normalize=1.0, scale=2.5),
        RoutingRule(select_first=True),
        RoutingRule(select_first=True, normalize=1.0),
    ],
    ids=["normalized", "of selected", "both"],
)
def test_a_softmax_over_selected_logits_saves_none_of_them(rule):
    """The weights, which experts save as well, give the same gradient as float64 logits."""
    x, weight = (torch.randn(size, 16).bfloat16().requires_grad_() for size in (40, 12))
    saved = []
    with saved_tensors_hooks(lambda t: saved.append(tuple(t.shape)) or t, lambda t: t):
        ids, weights, _ = route_tokens(x, weight, None, 3, rule)
    assert (40, 12) not in saved
    dweights = torch.randn(40, 3)
    got = torch.autograd.grad(weights, (x, weight), dweights)
    exact = [t.detach().double().requires_grad_() for t in (x, weight)]
    want = oracle.weigh(exact[0] @ exact[1].T, ids.long(), rule)
    for one, other in zip(got, torch.autograd.grad(want, exact, dweights.double())):
        assert relative_error(one, other) < 3e-3  # that of rounding to bfloat16


def test_other_weights_save_the_logits():
    x, weight = (torch.randn(size, 16).bfloat16().requires_grad_() for size in (40, 12))
    saved = []
    with saved_tensors_hooks(lambda t: saved.append(tuple(t.shape)) or t, lambda t: t):
        route_tokens(x, weight, None, 3, RoutingRule(normalize=2.0))
    assert (40, 12) in saved


def test_negative_and_positive_zero_tie():
    logits = torch.tensor([[0.0, -0.0, 0.0, -1.0], [-0.0, 0.0, -1.0, -0.0]])
    ids, _ = route(logits, None, 3, RoutingRule(select_first=True))
    assert ids.tolist() == [[0, 1, 2], [0, 1, 3]]


def test_one_group_is_kept():
    """Of tied groups, the first one."""
    rule = RoutingRule(select_first=True, num_groups=6, groups_kept=1)
    logits = torch.randn(64, 12)
    logits[0] = torch.tensor([1.0, 0.0] * 6)
    ids, _ = route(logits, None, 2, rule)
    assert ids.tolist() == oracle.select(logits, None, rule, 2)
    assert ids[0].tolist() == [0, 1]


def test_second_derivative_is_refused():
    """The gradient operators have no gradient, so a second derivative would be wrong in silence."""
    rows = torch.randn(12, 8, requires_grad=True)
    weights = torch.rand(6, 2, requires_grad=True)
    permutation = CudaPermutation(None)
    plan = permutation.plan(torch.rand(6, 4).topk(2).indices, 4)
    y = permutation.unpermute(rows, plan, weights)
    torch.autograd.grad(y.sum(), (rows, weights), retain_graph=True)
    with pytest.raises(RuntimeError, match="gradients of 'cuda' cannot be differentiated"):
        torch.autograd.grad(y.sum(), (rows, weights), create_graph=True)


@pytest.mark.parametrize("shape", [(2, 2), (4, 3, 2)])
def test_ids_of_the_wrong_shape_are_refused(shape):
    with pytest.raises(
        ValueError, match=r"topk_ids is \[.*\], and there are 12 tokens; give ids \[T, K\]"
    ):
        weigh(torch.randn(12, 8), torch.zeros(shape, dtype=torch.int32), RoutingRule())


def test_plan_of_other_tokens_is_refused():
    permutation = CudaPermutation(None)
    plan = permutation.plan(torch.zeros(6, 2, dtype=torch.int32), 4)
    with pytest.raises(
        ValueError, match="x has 5 tokens and the plan 12 slots; there must be 2 a token"
    ):
        permutation.permute(torch.randn(5, 8), plan)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [1, 9, 17, 49, 65])
def test_logits_of_few_tokens_and_many(tokens, dtype):
    """Rows longer than a block reads at a time: by each kernel, and by a matmul of torch."""
    x = torch.randn(tokens, 2056, dtype=dtype)
    weight = torch.randn(9, 2056, dtype=dtype)
    want = x.double() @ weight.double().t()
    assert relative_error(logits_op(x, weight), want) < 1e-6


def test_fakes_of_transposed_logits_match():
    x = torch.randn(8, 12).bfloat16().t().requires_grad_()
    weight = torch.randn(4, 8).bfloat16().requires_grad_()
    torch.library.opcheck(logits_op.op, (x, weight))
    torch.library.opcheck(
        logits_backward_op.op, (torch.randn(12, 4), x.detach(), weight.detach(), [True, True])
    )


def test_nan_logits_give_nan_weights():
    logits = torch.tensor([[1.0, float("nan"), 3.0, 0.0]])
    ids = torch.tensor([[1, 2]], dtype=torch.int32)
    assert weigh(logits, ids, RoutingRule(select_first=True)).isnan().all()


def test_negative_ids_weigh_0():
    logits = torch.randn(3, 8)
    weights = weigh(logits, torch.tensor([[-1, 2]] * 3), RoutingRule())
    assert (weights[:, 0] == 0).all()


def test_selection_bias_can_be_bfloat16():
    """model.to(bfloat16) casts it."""
    bias = torch.tensor([0.0, 0.0, 5.0, 0.0])
    ids = [route(torch.zeros(3, 4), b, 1, RoutingRule())[0] for b in (bias, bias.bfloat16())]
    assert torch.equal(*ids)


@pytest.mark.parametrize("needs", [[True, True], [True, False], [False, True]])
@pytest.mark.parametrize("experts", [1, 37])
def test_gradients_of_few_tokens(experts, needs):
    """Tokens, experts and columns are partial blocks; nothing is rounded before the result."""
    x = torch.randn(45, 72).bfloat16()
    weight = torch.randn(experts, 72).bfloat16()
    dlogits = torch.randn(45, experts)
    wide = dlogits.double()
    want = (wide @ weight.double(), wide.t() @ x.double())
    for got, exact, need in zip(logits_backward_op(dlogits, x, weight, needs), want, needs):
        if need:
            rounded = exact.bfloat16()
            assert relative_error(got, rounded) < 1e-3
        else:
            assert got.numel() == 0
