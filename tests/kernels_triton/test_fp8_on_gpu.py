"""The matmuls in FP8 on a Hopper GPU: against float64, replayed, captured, with kept weights."""

import pytest
import torch

from tokenyard import MoE, RoutingRule, Workload
from tokenyard.activations import activate, up_rows
from tokenyard.experts import rows_times
from tokenyard.fp8 import Quantized, dequantize, quantize_rows
from tokenyard.interfaces import ExpertWeights
from tokenyard.permutations import TorchPermutation
from tokenyard.testing._compare import poisoned_memory
from tokenyard.tolerance import relative_error

pytestmark = pytest.mark.gpu

BF16 = torch.bfloat16
NEAR = 3e-3  # the error of rounding to bfloat16, and of the tensor cores' sums of 128 numbers


def random(*size):
    return torch.randn(size, device="cuda", dtype=BF16)


class Rows:
    """A plan with skew, an empty expert and dropped slots, and its tile lists."""

    def __init__(self, tokens=777, experts=9, top_k=4):
        from tokenyard_kernels_triton.ops._row_tiles import RowTiles
        from tokenyard_kernels_triton.permutation import TritonPermutation

        workload = Workload(128, 128, experts, top_k, dtype=BF16, device="cuda")
        ids = torch.rand(tokens, experts - 1, device="cuda").topk(top_k).indices.int()
        ids[::5, 0] = experts
        ids[: tokens // 2, 1] = 2
        self.plan = TritonPermutation(workload).plan(ids, experts)
        self.tiles = RowTiles(self.plan.offsets, self.plan.order.shape[0])
        self.kept = int(self.plan.offsets[-1])
        self.tokens = self.plan.order.long()[: self.kept] // top_k
        self.count = tokens
        self.experts = experts

    def product(self, rows, weights):
        """Return rows [R, M] @ weights [E, M, N] in float64, for the rows before the tail."""
        return rows_times(rows.double(), weights.double(), self.plan.offsets)


def operands(rows, copied, dim):
    """Return tokens as an operand that is copied or gathered, and its rows in float32."""
    from tokenyard_kernels_triton.ops import _gluon_fp8
    from tokenyard_kernels_triton.ops._gluon_operands import NARROW
    from tokenyard_kernels_triton.ops._quantize import quantize_tokens

    tokens = quantize_tokens(random(rows.count, dim))
    operand = _gluon_fp8.rows_of(tokens, rows.plan, NARROW + 1 if copied else NARROW)
    return operand, dequantize(tokens)[rows.tokens]


def quantized_weights(*size):
    """Return weights in both layouts, and in float32. Blocks have scales that differ much."""
    from tokenyard_kernels_triton.ops._quantize import quantize_weights

    blocks = torch.randn(size[0], size[1] // 128, size[2] // 128, device="cuda").exp()
    factors = blocks.repeat_interleave(128, 1).repeat_interleave(128, 2)
    weights = quantize_weights((random(*size) * factors).to(BF16), True, True)
    return weights, dequantize(Quantized(weights.values, weights.scales))


@pytest.mark.parametrize("copied", [True, False], ids=["copied", "gathered"])
@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize(("depth", "width"), [(128, 128), (1152, 256), (640, 896)])
def test_times_weight(copied, transposed, depth, width):
    """Against float64 on the same quantized operands; the width may end within a tile."""
    from tokenyard_kernels_triton.ops import _gluon_fp8

    torch.manual_seed(0)
    rows = Rows()
    left, numbers = operands(rows, copied, depth)
    size = (rows.experts, width, depth) if transposed else (rows.experts, depth, width)
    weight, matrices = quantized_weights(*size)
    bias = random(rows.experts, width)
    with poisoned_memory():
        got = _gluon_fp8.times_weight(left, weight, bias, rows.tiles, transposed, BF16)
    want = rows.product(numbers, matrices.mT if transposed else matrices)
    experts = torch.arange(rows.experts, device="cuda").repeat_interleave(rows.plan.offsets.diff())
    assert relative_error(got[: rows.kept], want + bias.double()[experts]) < NEAR


@pytest.mark.parametrize("copied", [True, False], ids=["copied", "gathered"])
@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
@pytest.mark.parametrize(("dim", "ffn_dim"), [(128, 128), (1152, 384)])
def test_up_and_activate(copied, activation, dim, ffn_dim):
    """z and a against float64, each in its blocks; the ungated tile has two blocks of a."""
    from tokenyard_kernels_triton.ops import _gluon_fp8

    torch.manual_seed(0)
    rows = Rows()
    left, numbers = operands(rows, copied, dim)
    up, matrices = quantized_weights(rows.experts, up_rows(activation, ffn_dim), dim)
    want = rows.product(numbers, matrices.mT / dim**0.5)
    up = up._replace(scales=up.scales / dim**0.5)

    def run(save):
        with poisoned_memory():
            (z, scales), a = _gluon_fp8.up_and_activate(
                left, up, None, rows.tiles, activation, save, BF16
            )
        if save == "fp8":
            z = dequantize(Quantized(z.view(torch.float8_e4m3fn), scales))
        return z[: rows.kept], dequantize(a)[: rows.kept]

    z, a = run("pre_activation")
    assert relative_error(z, want) < NEAR
    assert relative_error(a, dequantize(quantize_rows(activate(want.float(), activation)))) < 1e-2
    z, again = run("fp8")
    assert torch.equal(a, again)
    assert relative_error(z, dequantize(quantize_rows(want.float()))) < 1e-2
    assert torch.equal(run("recompute")[1], a)


def test_long_sums_of_positive_numbers():
    from tokenyard_kernels_triton.ops import _gluon_fp8
    from tokenyard_kernels_triton.ops._quantize import quantize_tokens, quantize_weights

    rows = Rows(tokens=64, experts=3, top_k=1)
    tokens = quantize_tokens(random(rows.count, 14336).abs())
    left = _gluon_fp8.rows_of(tokens, rows.plan, 4096)
    weight = quantize_weights(random(rows.experts, 256, 14336).abs(), True, False)
    got = _gluon_fp8.times_weight(left, weight, None, rows.tiles, True, BF16)[: rows.kept]
    matrices = dequantize(Quantized(weight.values, weight.scales))
    assert relative_error(got, rows.product(dequantize(tokens)[rows.tokens], matrices.mT)) < NEAR


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


@pytest.mark.parametrize("save", ["fp8", "pre_activation", "recompute"])
@pytest.mark.parametrize("versions", [True, False])
def test_replayed_launches_and_kept_weights_give_the_same_bits(monkeypatch, save, versions):
    """In all of several steps, between which the weights change in place."""
    from tokenyard_kernels_triton import replay

    moe = layer(save=save)
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


def test_a_captured_layer_sees_weights_that_change():
    """A CUDA graph quantizes the weights at each replay, even if they were kept before."""
    moe = layer()
    moe.experts.kernel.weights_have_versions = True
    x = random(512, 256).requires_grad_()
    dy = random(512, 256)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(moe, x, dy)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(moe, x, dy)
    for _ in range(2):
        with torch.no_grad():
            moe.experts.up.mul_(1.25)
        graph.replay()
        torch.cuda.synchronize()
        for got, want in zip(captured, step(moe, x, dy)):
            assert torch.equal(got, want)


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
