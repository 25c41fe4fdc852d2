"""Tests that need a GPU: CUDA graphs, skew, over 2^31 elements, and the time of a plan."""

import pytest
import torch

from tokenyard import MoE, RoutingRule, Workload
from tokenyard.interfaces import ExpertWeights
from tokenyard.tolerance import relative_error

pytestmark = pytest.mark.gpu

BACKENDS = ("triton", "gluon")


def layer(backend: str, **sizes) -> MoE:
    workload = Workload(
        **sizes, router=RoutingRule(normalize=1.0), dtype=torch.bfloat16, device="cuda"
    )
    parts = {"experts": backend, "router": "triton", "permutation": "triton"}
    return MoE(workload, backends=parts, dtype=torch.bfloat16)


@pytest.mark.parametrize("backend", [*BACKENDS, "sparse"])
def test_whole_layer_is_captured_and_replayed_with_new_routing(backend):
    """Forward and backward in one CUDA graph, without a host sync; a replay routes new tokens."""
    torch.manual_seed(1)
    moe = layer(backend, dim=256, ffn_dim=384, num_experts=16, top_k=4)
    x = torch.randn(512, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    dy = torch.randn_like(x)
    leaves = [x, moe.router.weight, moe.experts.up, moe.experts.down]

    def step():
        y, routing = moe(x)
        return y, routing.topk_ids, *torch.autograd.grad(y, leaves, dy)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):
            step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    before = captured[1].clone()
    for _ in range(3):
        with torch.no_grad():
            x.copy_(torch.randn_like(x))
        for tensor in captured:
            tensor.fill_(99) if not tensor.is_floating_point() else tensor.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        assert not torch.equal(captured[1], before), "the routing is that of the capture"
        for got, want in zip(captured, step()):
            assert torch.equal(got, want)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("share", [0.5, 1.0])
def test_skew(backend, share):
    """One expert gets half of all slots, or all; every matmul has many slices."""
    tokens = 3000
    dim = 512
    ffn_dim = 640
    experts = 8
    ids = torch.randint(0, experts, (tokens, 1), device="cuda", dtype=torch.int32)
    ids[torch.rand(tokens, device="cuda") < share] = 3
    _compare_with_torch(backend, ids, dim, ffn_dim, experts)


@pytest.mark.parametrize("backend", BACKENDS)
def test_more_than_two_to_the_31_elements(backend):
    """The last rows of a pre-activation of 2.5e9 numbers are right, too."""
    tokens = 152_000
    dim = 64
    ffn_dim = 4096
    experts = 4
    token = torch.arange(tokens, device="cuda")
    ids = torch.stack([token % experts, (token + 1) % experts], 1).int()
    assert ids.numel() * 2 * ffn_dim > 2**31
    _compare_with_torch(backend, ids, dim, ffn_dim, experts)


@pytest.mark.parametrize("backend", BACKENDS)
def test_wide_experts(backend):
    """Experts so wide that gluon copies rows instead of gathering them."""
    ids = torch.randint(0, 9, (700, 2), device="cuda", dtype=torch.int32)  # 8 drops
    _compare_with_torch(backend, ids, 328, 1416, 8)


@pytest.mark.parametrize("dim", [64, 200, 1032])
def test_gathered_rows_give_the_same_bits_as_copied_ones(dim):
    """In every matmul over tokens; some slots are dropped, and one expert has none."""
    from tokenyard_kernels_triton.ops import _gluon
    from tokenyard_kernels_triton.ops._moves import to_rows
    from tokenyard_kernels_triton.ops._row_tiles import RowTiles
    from tokenyard_kernels_triton.permutation import TritonPermutation

    tokens = 777
    ffn_dim = 264
    experts = 9
    top_k = 4
    workload = Workload(dim, ffn_dim, experts, top_k, dtype=torch.bfloat16, device="cuda")
    ids = torch.rand(tokens, experts - 1, device="cuda").topk(top_k).indices.int()
    ids[::5, 0] = experts
    plan = TritonPermutation(workload).plan(ids, experts)
    row_tiles = RowTiles(plan.offsets, plan.order.shape[0])
    kept = int(plan.offsets[-1])

    def random(*size):
        return torch.randn(size, device="cuda", dtype=torch.bfloat16)

    x = random(tokens, dim)
    up = random(experts, 2 * ffn_dim, dim)
    down = random(experts, dim, ffn_dim)
    z = random(row_tiles.rows, 2 * ffn_dim)
    a = random(row_tiles.rows, ffn_dim)

    def matmuls(rows):
        return (
            _gluon.up_and_activate(rows, up, None, row_tiles, "swiglu")[0][:kept],
            _gluon.times_weight(rows, down, None, row_tiles, False, "activation_gradient")[:kept],
            _gluon.weight_gradient(z, rows, row_tiles, "up_gradient"),
            _gluon.weight_gradient(rows, a, row_tiles, "down_gradient"),
        )

    gathered = _gluon.rows_of(x, plan, ffn_dim)
    assert not isinstance(gathered, torch.Tensor)
    for got, want in zip(matmuls(gathered), matmuls(to_rows(x, plan))):
        assert torch.equal(got, want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_nan_token_reaches_only_its_experts(backend):
    """Even if rows of two experts share a slice of a weight gradient."""
    torch.manual_seed(3)
    moe = layer(backend, dim=128, ffn_dim=256, num_experts=8, top_k=2)
    x = torch.randn(300, 128, device="cuda", dtype=torch.bfloat16)
    ids = torch.randint(0, 8, (300, 1), device="cuda", dtype=torch.int32)
    ids = torch.cat([ids, (ids + 1) % 8], 1)
    ids[0] = torch.tensor([2, 5])
    x[0] = float("nan")
    y, _ = moe(x, ids)
    up, down = torch.autograd.grad(y, [moe.experts.up, moe.experts.down], torch.randn_like(y))
    affected = torch.tensor([2, 5], device="cuda")
    for gradient in (up, down):
        finite = gradient.isfinite().flatten(1).all(1)
        assert not finite[affected].any()
        assert finite.sum() == 6


def _compare_with_torch(backend, ids, dim, ffn_dim, experts):
    from tokenyard.experts import TorchExperts
    from tokenyard_kernels_triton import experts as kernels
    from tokenyard_kernels_triton.permutation import TritonPermutation

    torch.manual_seed(2)
    workload = Workload(dim, ffn_dim, experts, ids.shape[1], dtype=torch.bfloat16, device="cuda")
    permutation = TritonPermutation(workload)
    tested = {"triton": kernels.TritonExperts, "gluon": kernels.GluonExperts}[backend](
        workload, permutation
    )

    def leaf(*size):
        return (torch.randn(size, device="cuda") * size[-1] ** -0.5).bfloat16().requires_grad_()

    x = leaf(ids.shape[0], dim)
    up = leaf(experts, 2 * ffn_dim, dim)
    down = leaf(experts, dim, ffn_dim)
    weights = torch.rand(ids.shape, device="cuda").requires_grad_()
    dy = torch.randn_like(x)
    plan = permutation.plan(ids, experts)
    results = []
    for kernel in (tested, TorchExperts(workload, permutation)):
        y = kernel(x, plan, weights, ExpertWeights(up, down))
        results.append([y.detach(), *torch.autograd.grad(y, [x, weights, up, down], dy)])
        del y
    for name, got, want in zip(("y", "d x", "d weights", "d up", "d down"), *results):
        assert relative_error(got, want) < 1e-2, name


def test_a_plan_takes_at_most_60_microseconds():
    """T 32768, E 128, K 8 on an H200: the median of ten, each after L2 was overwritten."""
    from tokenyard_kernels_triton.ops._plan import plan_op

    if "H200" not in torch.cuda.get_device_name():
        pytest.skip("the figure is for an H200")
    ids = torch.rand(32768, 128, device="cuda").topk(8).indices.int()
    flush = torch.empty(1 << 29, dtype=torch.int8, device="cuda")
    times = []
    for _ in range(13):
        for _ in range(6):
            flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        plan_op(ids, 128, ids.numel())
        end.record()
        torch.cuda.synchronize()
        times.append(1e3 * start.elapsed_time(end))
    assert sorted(times[3:])[5] <= 60, times
