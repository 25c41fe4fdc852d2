"""The Gluon matmuls against float64: on a GPU, and on a CPU in an interpreter of the tests."""

import pytest
import torch

from tokenyard import Workload
from tokenyard.activations import activate, swiglu, up_rows
from tokenyard.experts import rows_outer, rows_times
from tokenyard.fp8 import Quantized, dequantize, quantize_rows, quantize_weights
from tokenyard.permutations import TorchPermutation
from tokenyard.testing._compare import poisoned_memory
from tokenyard.tolerance import relative_error

from . import gluon_interpreter

BF16 = torch.bfloat16
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def interpreter(monkeypatch):
    if DEVICE == "cpu":
        gluon_interpreter.install(monkeypatch)


NEAR = 3e-3  # the error of rounding to bfloat16, and of the tensor cores' sums of 128 numbers


class Rows:
    """A plan with skew, an empty expert and dropped slots, and its tile lists."""

    def __init__(self, tokens=200, experts=5, top_k=2):
        from tokenyard_kernels_triton.ops._row_tiles import RowTiles

        workload = Workload(128, 128, experts, top_k, dtype=BF16, device=DEVICE)
        ids = torch.rand(tokens, experts - 1, device=DEVICE).topk(top_k).indices.int()
        ids[::5, 0] = experts
        ids[: tokens // 3, -1] = 1
        self.plan = TorchPermutation(workload).plan(ids, experts)
        self.tiles = RowTiles(self.plan.offsets, self.plan.order.shape[0])
        self.kept = int(self.plan.offsets[-1])
        self.tokens = self.plan.order.long()[: self.kept] // top_k
        self.count = tokens
        self.experts = experts

    def product(self, rows, weights):
        """Return rows [R, M] @ weights [E, M, N] in float64, for the rows before the tail."""
        return rows_times(rows.double(), weights.double(), self.plan.offsets)


def random(*size):
    return torch.randn(size, device=DEVICE, dtype=BF16)


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
    from tokenyard_kernels_triton.ops import _quantize

    blocks = torch.randn(size[0], size[1] // 128, size[2] // 128, device=DEVICE).exp()
    factors = blocks.repeat_interleave(128, 1).repeat_interleave(128, 2)
    weights = _quantize.quantize_weights((random(*size) * factors).to(BF16), True, True)
    return weights, dequantize(Quantized(weights.values, weights.scales))


@pytest.mark.parametrize("copied", [True, False], ids=["copied", "gathered"])
@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize(("depth", "width"), [(128, 128), (256, 384)])
def test_times_weight_in_fp8(copied, transposed, depth, width):
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
    experts = torch.arange(rows.experts, device=DEVICE).repeat_interleave(rows.plan.offsets.diff())
    assert relative_error(got[: rows.kept], want + bias.double()[experts]) < NEAR


@pytest.mark.parametrize("copied", [True, False], ids=["copied", "gathered"])
@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
@pytest.mark.parametrize(("dim", "ffn_dim"), [(128, 128), (256, 384)])
def test_up_and_activate_in_fp8(copied, activation, dim, ffn_dim):
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


def test_long_sums_of_positive_numbers_in_fp8():
    """The tensor cores' sums, also the interpreter's, err by 1e-2 without promotion."""
    from tokenyard_kernels_triton.ops import _gluon_fp8
    from tokenyard_kernels_triton.ops._quantize import QuantizedWeights

    rows = Rows(tokens=64, experts=3, top_k=1)
    tokens = quantize_rows(random(rows.count, 14336).abs())
    left = _gluon_fp8.rows_of(tokens, rows.plan, 4096)
    values, scales = quantized = quantize_weights(random(rows.experts, 256, 14336).abs())
    weight = QuantizedWeights(values, None, scales)
    got = _gluon_fp8.times_weight(left, weight, None, rows.tiles, True, BF16)[: rows.kept]
    want = rows.product(dequantize(tokens)[rows.tokens], dequantize(quantized).mT)
    assert relative_error(got, want) < NEAR


def test_tokens_are_gathered_if_32_bits_count_their_units_of_16_bytes():
    from tokenyard_kernels_triton.ops._gluon_operands import NARROW, are_gathered

    def tokens(number):
        return torch.empty(number, 2048, dtype=BF16, device="meta")

    most = 2**35 // (2 * 2048)  # 32 GiB
    assert are_gathered(tokens(most - 1), NARROW)
    assert not are_gathered(tokens(most), NARROW)
    assert not are_gathered(tokens(1), NARROW + 1)


@pytest.mark.parametrize("copied", [True, False], ids=["copied", "gathered"])
def test_matmuls_in_16_bits(copied):
    """All of a layer, with widths that end within a tile and a slice."""
    from tokenyard_kernels_triton.ops import _gluon
    from tokenyard_kernels_triton.ops._gluon_operands import NARROW

    rows = Rows()
    dim, ffn_dim = 200, 328
    tokens = random(rows.count, dim)
    x = tokens[rows.tokens]
    left = _gluon.rows_of(tokens, rows.plan, NARROW + 1 if copied else NARROW)
    up = random(rows.experts, 2 * ffn_dim, dim) / dim**0.5
    down = random(rows.experts, dim, ffn_dim)
    total = torch.randn(rows.experts, 2 * ffn_dim, dim, device=DEVICE)
    start = total.double()
    with poisoned_memory():
        z, a = _gluon.up_and_activate(left, up, None, rows.tiles, "swiglu")
        y = _gluon.times_weight(a, down, None, rows.tiles, True, "down")
        da = _gluon.times_weight(left, down, None, rows.tiles, False, "activation_gradient")
        dup = _gluon.weight_gradient(z, left, rows.tiles, "up_gradient")
        ddown = _gluon.weight_gradient(left, a, rows.tiles, "down_gradient")
        summed = _gluon.weight_gradient(z, left, rows.tiles, "up_gradient", total=total)
    assert summed is total
    z, a, y, da = (result[: rows.kept] for result in (z, a, y, da))
    offsets = rows.plan.offsets
    assert relative_error(z, rows.product(x, up.mT)) < NEAR
    assert relative_error(a, activate(z.double(), "swiglu")) < NEAR
    assert relative_error(y, rows.product(a, down.mT)) < NEAR
    assert relative_error(da, rows.product(x, down)) < NEAR
    assert relative_error(dup, rows_outer(z.double(), x.double(), offsets)) < NEAR
    assert relative_error(ddown, rows_outer(x.double(), a.double(), offsets)) < NEAR
    assert relative_error(total - start, rows_outer(z.double(), x.double(), offsets)) < 1e-5


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("activation", ["swiglu", "gelu", swiglu(1.702, 1, 1)])
@pytest.mark.parametrize("copied", [True, False], ids=["copied", "gathered"])
def test_differentiate_down(copied, activation, weighted):
    """dz, the weighted activation and the gradient of the weights, against autograd in float64."""
    from tokenyard_kernels_triton.ops import _gluon
    from tokenyard_kernels_triton.ops._gluon_operands import NARROW

    rows = Rows()
    dim, ffn_dim = 200, 328
    tokens = random(rows.count, dim)
    left = _gluon.rows_of(tokens, rows.plan, NARROW + 1 if copied else NARROW)
    down = random(rows.experts, dim, ffn_dim) / dim**0.5
    z = random(len(rows.plan.order), up_rows(activation, ffn_dim))
    weights = torch.rand(rows.plan.order.shape, device=DEVICE) if weighted else None
    dz = z.clone()  # in the place of z, as when no later backward pass reads that
    with poisoned_memory():
        a, dots = _gluon.differentiate_down(
            left, down, dz, dz, rows.plan.order, weights, rows.tiles, activation
        )
    w = weights[rows.plan.order[: rows.kept].long(), None].double() if weighted else 1.0
    da = rows.product(tokens[rows.tokens], down)
    exact = z[: rows.kept].double().requires_grad_()
    act = activate(exact, activation)
    (want,) = torch.autograd.grad(act, exact, da * w)
    assert relative_error(dz[: rows.kept], want) < NEAR
    assert relative_error(a[: rows.kept], act.detach() * w) < NEAR
    assert relative_error(dots[: rows.kept].sum(1), (da * act.detach()).sum(1)) < NEAR
