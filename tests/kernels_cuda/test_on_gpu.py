"""Tests that need a GPU: core's conformance kit, CUDA graphs, streams, threads and large sizes."""

import threading

import pytest
import torch

from tokenyard import MoE, RoutingRule, Workload
from tokenyard.permutations import TorchPermutation
from tokenyard.testing import PermutationConformance, TopKRouterConformance
from tokenyard.tolerance import relative_error

pytestmark = pytest.mark.gpu


class TestPermutation(PermutationConformance):
    backend = "cuda"


class TestPermutationOfOddRows(PermutationConformance):
    backend = "cuda"
    dim = 15


class TestRouter(TopKRouterConformance):
    backend = "cuda"


class TestRouterOfManyExperts(TopKRouterConformance):
    backend = "cuda"
    num_experts, top_k = 72, 9


def permutation(**sizes):
    from tokenyard_kernels_cuda.permutation import CudaPermutation

    return CudaPermutation(
        Workload(**{"dim": 8, "ffn_dim": 8, "num_experts": 2, "top_k": 1, "device": "cuda"} | sizes)
    )


@pytest.mark.parametrize("experts", ["torch", "triton", "gluon"])
def test_cuda_graph_of_a_layer_replays_with_new_routing(experts):
    """One graph of forward and backward, so there is no host sync; a replay routes new tokens."""
    torch.manual_seed(1)
    rule = RoutingRule(normalize=1.0)
    sizes = Workload(256, 384, 16, 4, router=rule, dtype=torch.bfloat16, device="cuda")
    moe = MoE(
        sizes,
        backends={"experts": experts, "router": "cuda", "permutation": "cuda"},
        dtype=torch.bfloat16,
    )
    x = torch.randn(512, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    leaves = [x, *moe.parameters()]
    dy = torch.randn_like(x)

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
    with torch.no_grad():
        x.copy_(torch.randn_like(x))
    for tensor in captured:
        tensor.fill_(99) if not tensor.is_floating_point() else tensor.fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize()
    assert not torch.equal(captured[1], before), "the routing is that of the capture"
    for got, want in zip(captured, step()):
        assert torch.equal(got, want)


@pytest.mark.parametrize(
    ("tokens", "experts", "top_k"),
    [(32768, 128, 8), (8192, 16, 4), (1_000_003, 60, 5), (900, 4095, 2)],
)
def test_large_plans_equal_core_s(tokens, experts, top_k):
    ids = torch.randint(0, experts + 1, (tokens, top_k), device="cuda", dtype=torch.int32)
    got = permutation().plan(ids, experts)
    want = TorchPermutation(None).plan(ids, experts)
    assert all(torch.equal(a, b) for a, b in zip(got[:3], want[:3]))


def test_more_than_2_to_the_31_elements():
    """In x and in rows: indices need 64 bits. The last rows are checked."""
    tokens, dim = 540_000, 4096
    assert tokens * dim > 2**31
    ids = (torch.arange(tokens, device="cuda", dtype=torch.int32) % 3).unsqueeze(1)
    x = torch.randn(tokens, dim, device="cuda", dtype=torch.bfloat16)
    cuda = permutation()
    plan = cuda.plan(ids, 3)
    rows = cuda.permute(x, plan)
    assert torch.equal(rows[-1000:], x[plan.order[-1000:].long()])
    y = cuda.unpermute(rows, plan, None)
    assert torch.equal(y[-1000:], x[-1000:])


def test_kernels_run_on_torch_s_current_stream():
    """A kernel runs after the earlier work on its stream."""
    x = torch.ones(4096, 512, device="cuda")
    ids = torch.zeros(4096, 1, dtype=torch.int32, device="cuda")
    cuda = permutation()
    stream = torch.cuda.Stream()
    plan = cuda.plan(ids, 1)
    # Load all kernels first, torch's too: loading synchronises with the GPU.
    cuda.permute(x.mul_(1), plan)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        x.mul_(3)
        rows = cuda.permute(x, plan)
        assert not stream.query(), "the stream was idle before the kernel was launched"
    stream.synchronize()
    assert (rows == 3).all()


def test_new_thread_gets_a_context():
    results = []
    x = torch.randn(64, 32, device="cuda")
    ids = torch.zeros(64, 1, dtype=torch.int32, device="cuda")
    cuda = permutation()
    plan = cuda.plan(ids, 1)
    thread = threading.Thread(target=lambda: results.append(cuda.permute(x, plan)))
    thread.start()
    thread.join()
    assert torch.equal(results[0], x)


def test_no_kernel_spills_registers():
    from cuda.bindings import driver

    from tokenyard_kernels_cuda.sources import kernels
    from tokenyard_kernels_cuda.toolchain import _driver

    torch.zeros(1, device="cuda")
    local = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES
    for kernel in kernels():
        function = driver.CUfunction(_driver.function(kernel.source, kernel.name, 0).value)
        assert _driver.checked(driver.cuFuncGetAttribute(local, function), "an attribute") == 0, (
            kernel.name
        )


def test_two_runs_are_bit_identical():
    ids = torch.rand(4096, 32, device="cuda").topk(4).indices.int()
    cuda = permutation()
    plan = cuda.plan(ids, 32)
    rows = torch.randn(
        len(plan.order), 1024, device="cuda", dtype=torch.bfloat16, requires_grad=True
    )
    weights = torch.rand(4096, 4, device="cuda", requires_grad=True)
    dy = torch.randn(4096, 1024, device="cuda", dtype=torch.bfloat16)

    def run():
        y = cuda.unpermute(rows, plan, weights)
        return y, *torch.autograd.grad(y, (rows, weights), dy)

    assert all(torch.equal(a, b) for a, b in zip(run(), run()))


def test_large_moves_match_core_s():
    """At a size that fills every multiprocessor."""
    ids = torch.rand(8192, 17, device="cuda").topk(4).indices.int()  # id 16 is dropped
    x = torch.randn(8192, 2048, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weights = torch.rand(8192, 4, device="cuda", requires_grad=True)
    dy = torch.randn_like(x)

    def run(backend):
        plan = backend.plan(ids, 16)
        y = backend.unpermute(backend.permute(x, plan), plan, weights)
        return y, *torch.autograd.grad(y, (x, weights), dy)

    for got, want in zip(run(permutation()), run(TorchPermutation(None))):
        assert relative_error(got, want) < 2 * torch.finfo(torch.bfloat16).eps
