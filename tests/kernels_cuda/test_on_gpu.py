"""What only a GPU shows: core's kit on the kernels as they are, graphs, streams, threads, sizes."""

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
def test_whole_layer_is_captured_and_replayed_with_new_routing(experts):
    """Forward and backward in one CUDA graph, so nothing waits for the host; new tokens route anew in the replay."""
    torch.manual_seed(1)
    rule = RoutingRule(normalize=1.0)
    sizes = Workload(256, 384, 16, 4, router=rule, dtype=torch.bfloat16, device="cuda")
    moe = MoE(
        sizes,
        backends={"experts": experts, "router": "cuda", "permutation": "cuda"},
        dtype=torch.bfloat16,
    )
    x = torch.randn(512, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    leaves, dy = [x, *moe.parameters()], torch.randn_like(x)

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
def test_large_plans_are_core_s(tokens, experts, top_k):
    ids = torch.randint(0, experts + 1, (tokens, top_k), device="cuda", dtype=torch.int32)
    got, want = (p.plan(ids, experts) for p in (permutation(), TorchPermutation(None)))
    assert all(torch.equal(a, b) for a, b in zip(got[:3], want[:3]))


def test_more_than_two_to_the_31_elements():
    """In x, in rows, and in both gradients; the last rows are as right as the first."""
    tokens, dim = 540_000, 4096
    assert tokens * dim > 2**31
    ids = (torch.arange(tokens, device="cuda", dtype=torch.int32) % 3).unsqueeze(1)
    x = torch.randn(tokens, dim, device="cuda", dtype=torch.bfloat16)
    moved = permutation()
    plan = moved.plan(ids, 3)
    rows = moved.permute(x, plan)
    assert torch.equal(rows[-1000:], x[plan.order[-1000:].long()])
    back = moved.unpermute(rows, plan, None)
    assert torch.equal(back[-1000:], x[-1000:])


def test_it_runs_on_torch_s_current_stream():
    """A kernel waits for what was put on its stream before it."""
    x, ids = (
        torch.ones(4096, 512, device="cuda"),
        torch.zeros(4096, 1, dtype=torch.int32, device="cuda"),
    )
    moved, stream = permutation(), torch.cuda.Stream()
    plan = moved.plan(ids, 1)
    moved.permute(
        x.mul_(1), plan
    )  # by now all kernels are loaded, ours and torch's: loading waits for the GPU
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        x.mul_(3)
        rows = moved.permute(x, plan)
        assert not stream.query(), "the stream was done before the kernel was put on it"
    stream.synchronize()
    assert (rows == 3).all()


def test_a_new_thread_has_no_context_and_gets_one():
    found = []
    x, ids = (
        torch.randn(64, 32, device="cuda"),
        torch.zeros(64, 1, dtype=torch.int32, device="cuda"),
    )
    moved = permutation()
    plan = moved.plan(ids, 1)
    thread = threading.Thread(target=lambda: found.append(moved.permute(x, plan)))
    thread.start()
    thread.join()
    assert torch.equal(found[0], x)


def test_no_kernel_spills_registers():
    from cuda.bindings import driver

    from tokenyard_kernels_cuda.sources import kernels
    from tokenyard_kernels_cuda.toolchain import _driver

    torch.zeros(1, device="cuda")
    local = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES
    for kernel in kernels():
        function = _driver.function(kernel.source, kernel.name, 0)
        assert _driver.checked(driver.cuFuncGetAttribute(local, function), "an attribute") == 0, (
            kernel.name
        )


def test_two_runs_are_the_same_bit_by_bit():
    ids = torch.rand(4096, 32, device="cuda").topk(4).indices.int()
    moved = permutation()
    plan = moved.plan(ids, 32)
    rows = torch.randn(
        len(plan.order), 1024, device="cuda", dtype=torch.bfloat16, requires_grad=True
    )
    weights = torch.rand(4096, 4, device="cuda", requires_grad=True)
    dy = torch.randn(4096, 1024, device="cuda", dtype=torch.bfloat16)

    def run():
        y = moved.unpermute(rows, plan, weights)
        return y, *torch.autograd.grad(y, (rows, weights), dy)

    assert all(torch.equal(a, b) for a, b in zip(run(), run()))


def test_large_moves_are_core_s():
    """At a size at which every multiprocessor is busy."""
    ids = torch.rand(8192, 17, device="cuda").topk(4).indices.int()  # 16 drops
    x = torch.randn(8192, 2048, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weights = torch.rand(8192, 4, device="cuda", requires_grad=True)
    dy = torch.randn_like(x)

    def run(moved):
        plan = moved.plan(ids, 16)
        y = moved.unpermute(moved.permute(x, plan), plan, weights)
        return y, *torch.autograd.grad(y, (x, weights), dy)

    for got, want in zip(run(permutation()), run(TorchPermutation(None))):
        assert relative_error(got, want) < 2 * torch.finfo(torch.bfloat16).eps
