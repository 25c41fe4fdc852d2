"""Experts in FP8 on a Hopper GPU: replayed, captured, with kept weights, and large."""

from contextlib import nullcontext

import pytest
import torch

from tokenyard import MoE, RoutingRule, Workload
from tokenyard.interfaces import ExpertWeights
from tokenyard.permutations import TorchPermutation
from tokenyard.weight_copies import captured_weight_copies, renew_weight_copies
from tokenyard_kernels_triton.ops._fp8_weights import _entries

pytestmark = pytest.mark.gpu

BF16 = torch.bfloat16


def random(*size):
    return torch.randn(size, device="cuda", dtype=BF16)


def layer(**options):
    workload = Workload(
        256, 384, 16, 4, router=RoutingRule(normalize=1.0), dtype=BF16, device="cuda"
    )
    experts = {"name": "gluon", "precision": "fp8", **options}
    parts = {"experts": experts, "router": "triton", "permutation": "triton"}
    return MoE(workload, backends=parts, dtype=BF16)


def step(moe, x, dy):
    """Return y, and the gradients of x and of all weights."""
    y, _ = moe(x)
    leaves = [x, moe.router.weight, moe.experts.up, moe.experts.down]
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


@pytest.mark.parametrize(
    ("save", "weight_gradients"),
    [("fp8", None), ("fp8", "fp8"), ("pre_activation", None), ("recompute", None)],
)
@pytest.mark.parametrize("versions", [True, False])
def test_replayed_launches_and_kept_weights_give_the_same_bits(
    monkeypatch, save, weight_gradients, versions
):
    """In all of several steps, between which the weights change in place."""
    from tokenyard_kernels_triton import replay

    moe = layer(save=save, weight_gradients=weight_gradients)
    start = {name: tensor.clone() for name, tensor in moe.state_dict().items()}
    inputs = [(random(512, 256).requires_grad_(), random(512, 256)) for _ in range(4)]

    def run():
        moe.load_state_dict(start)
        results = []
        for x, dy in inputs:
            results += step(moe, x, dy)
            with torch.no_grad():
                moe.experts.up.mul_(1.25)
                moe.experts.down.add_(0.01)
        return results

    moe.experts.kernel.weights_have_versions = versions
    monkeypatch.setattr(replay, "_entries", type(replay._entries)())
    got = run()
    programs = [entry.program for entry in replay._entries.values()]
    assert programs
    assert None not in programs
    moe.experts.kernel.weights_have_versions = False
    monkeypatch.setattr(replay, "can_record", lambda: False)
    for one, other in zip(got, run(), strict=True):
        assert torch.equal(one, other)


def captured_step(moe, x, dy, context=None):
    """Return a CUDA graph of a step, captured in a context, and the results of its replays."""
    with torch.cuda.stream(torch.cuda.Stream()):
        for _ in range(3):
            step(moe, x, dy)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with context or nullcontext(), torch.cuda.graph(graph):
        return graph, step(moe, x, dy)


def test_a_captured_layer_sees_weights_that_change():
    """A CUDA graph quantizes the weights at each replay, even if they were kept before."""
    moe = layer()
    moe.experts.kernel.weights_have_versions = True
    x = random(512, 256).requires_grad_()
    dy = random(512, 256)
    graph, captured = captured_step(moe, x, dy)
    for _ in range(2):
        with torch.no_grad():
            moe.experts.up.mul_(1.25)
        graph.replay()
        torch.cuda.synchronize()
        for got, want in zip(captured, step(moe, x, dy)):
            assert torch.equal(got, want)


def test_replays_read_weights_that_their_owner_renews():
    """As an eager layer computes: without a change, after one in place, and after a step."""
    moe = layer()
    moe.experts.kernel.weights_have_versions = True
    x = random(512, 256).requires_grad_()
    dy = random(512, 256)
    graph, captured = captured_step(moe, x, dy, captured_weight_copies([moe]))
    optimizer = torch.optim.SGD([moe.router.weight])

    def change():
        moe.experts.up.data.mul_(1.25)
        optimizer.step()

    def double():
        with torch.no_grad():
            moe.experts.down.mul_(2)

    copies = {address: entry.weights.values.data_ptr() for address, entry in _entries.items()}
    for between in (lambda: None, change, double, change):
        between()
        renew_weight_copies([moe])
        graph.replay()
        torch.cuda.synchronize()
        moe.experts.kernel.weights_have_versions = False
        for got, want in zip(captured, step(moe, x, dy)):
            assert torch.equal(got, want)
        moe.experts.kernel.weights_have_versions = True
    assert copies == {a: entry.weights.values.data_ptr() for a, entry in _entries.items()}


def test_more_than_two_to_the_31_elements():
    """The last rows of a pre-activation of 2.5e9 numbers are those of the same rows alone."""
    from tokenyard_kernels_triton.experts import GluonExperts

    workload = Workload(128, 4096, 4, 2, dtype=BF16, device="cuda")
    kernel = GluonExperts(workload, None, precision="fp8")
    weights = ExpertWeights(random(4, 8192, 128), random(4, 128, 4096))
    x = random(152_000, 128)
    token = torch.arange(len(x), device="cuda")
    ids = torch.stack([token % 4, (token + 1) % 4], 1).int()
    assert ids.numel() * 8192 > 2**31
    topk_weights = torch.rand(ids.shape, device="cuda")

    def last(tokens):
        plan = TorchPermutation(workload).plan(ids[-tokens:], 4)
        return kernel(x[-tokens:].contiguous(), plan, topk_weights[-tokens:], weights)[-100:]

    assert torch.equal(last(len(x)), last(100))
