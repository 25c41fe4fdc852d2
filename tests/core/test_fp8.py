"""The FP8 recipe, its emulated expert layer, and the kit's tests of it; on the CPU."""

import math

import pytest
import torch

from tokenyard import Backend, MoE, Registry, Workload, hookimpl
from tokenyard.count import kept_by_ffn, saved_by_ffn, weight_copies
from tokenyard.exchanges import LocalExchange
from tokenyard.experts import EmulatedFp8Experts, TorchExperts
from tokenyard.fp8 import (
    BLOCK,
    LARGEST,
    SMALLEST_SCALE,
    dequantize,
    quantize_rows,
    quantize_weights,
    why_no_fp8,
)
from tokenyard.registry import Plugin
from tokenyard.strategies import SingleStrategy
from tokenyard.testing import Fp8ExpertsConformance
from tokenyard.testing._fp8_experts import NEAR_IN_LONG_SUMS
from tokenyard.tolerance import relative_error
from tokenyard.weight_copies import captured_weight_copies, renew_weight_copies


class Emulated(EmulatedFp8Experts):
    """The emulated layer, as a backend with the options of a real one."""

    def __init__(self, workload, permutation, precision, save="fp8", weight_gradients=None):
        super().__init__(workload, permutation, save, weight_gradients)


class Offer:
    @staticmethod
    @hookimpl
    def tokenyard_experts():
        return [Backend("emulated", f"{__name__}:Emulated")]


class EmulatedConformance(Fp8ExpertsConformance):
    backend = "emulated"
    device = "cpu"

    def registry(self):
        return Registry([Plugin(Offer, "emulated", "1.0")])


class TestEmulatedExperts(EmulatedConformance):
    pass


class KeepsPreActivation(EmulatedConformance):
    options = {"precision": "fp8", "save": "pre_activation"}


class WeightGradientsInFp8(EmulatedConformance):
    options = {"precision": "fp8", "weight_gradients": "fp8"}


class WeightGradientsInFp8OfKeptPreActivation(EmulatedConformance):
    options = {"precision": "fp8", "save": "pre_activation", "weight_gradients": "fp8"}


def test_a_row_has_a_scale_for_each_128_columns():
    rows = torch.randn(5, 3 * BLOCK) * torch.logspace(-20, 20, 3).repeat_interleave(BLOCK)
    quantized = quantize_rows(rows)
    assert quantized.scales.shape == (5, 3)
    largest = quantized.values.float().unflatten(1, (3, BLOCK)).abs().amax(2)
    assert (largest == LARGEST).all()
    for block in dequantize(quantized).split(BLOCK, 1):
        want = rows[:, :BLOCK]
        rows = rows[:, BLOCK:]
        assert 0.01 < relative_error(block, want) < 0.03


def test_transposed_weights_have_transposed_values_and_scales():
    weights = torch.randn(2, 2 * BLOCK, 3 * BLOCK)
    weights[1, :BLOCK, BLOCK:] *= 1e6
    quantized = quantize_weights(weights)
    transposed = quantize_weights(weights.mT)
    assert quantized.scales.shape == (2, 2, 3)
    assert torch.equal(quantized.scales.mT, transposed.scales)
    assert torch.equal(quantized.values.float().mT, transposed.values.float())
    assert 0.01 < relative_error(dequantize(quantized)[0], weights[0]) < 0.03


def test_nan_infinity_zeros_and_subnormal_numbers():
    rows = torch.randn(5, BLOCK)
    rows[0, 7] = math.nan
    rows[1, 7] = -math.inf
    rows[2] = 0
    rows[3] *= 1e-41
    rows[4] *= 1e-38
    got = dequantize(quantize_rows(rows))
    assert got[0].isnan().nonzero().tolist() == [[7]]
    assert got[1].isnan().all()
    assert not got[2].any()
    assert quantize_rows(rows).scales[2:4].unique().tolist() == [SMALLEST_SCALE]
    assert got[3:].isfinite().all()
    assert relative_error(got[4] * 1e38, rows[4] * 1e38) < 0.1


def test_widths_are_refused_in_one_sentence():
    assert why_no_fp8(256, 128) is None
    assert why_no_fp8(256, 136) == (
        "precision fp8 scales blocks of 128 columns, and ffn_dim is 136, not a multiple of 128"
    )


class Frugal(TorchExperts):
    """Says that it saves 3 bytes a row, and keeps copies of the weights of 2 bytes a number."""

    weights_have_versions = False

    def saved_bytes_per_row(self, width):
        return 3

    def weight_copy_bytes(self, numbers):
        return 2 * numbers


def test_estimates_ask_the_kernel():
    moe = MoE(Workload(32, 48, 4, 2), backends={"experts": "torch"})
    saved = [count(moe, 4) for count in (saved_by_ffn, kept_by_ffn)]
    assert weight_copies(moe) == 0
    moe.experts.kernel = Frugal(moe.workload, None)
    difference = 2 * (4 * 96 - 3)
    assert [count(moe, 4) + difference for count in (saved_by_ffn, kept_by_ffn)] == saved
    assert weight_copies(moe) == 0
    SingleStrategy().layout(moe)
    assert weight_copies(moe) == 2 * (moe.experts.up.numel() + moe.experts.down.numel())


class Renewing(Frugal):
    """Counts how often its copies are renewed."""

    captures_weight_copies = False
    renewed = 0

    def renew_weight_copies(self, weights):
        assert weights.up.shape == (4, 96, 32)
        self.renewed += 1


def test_a_graph_reads_copies_that_its_owner_renews():
    moe = MoE(Workload(32, 48, 4, 2), backends={"experts": "torch"})
    kernel = moe.experts.kernel = Renewing(moe.workload, None)
    renew_weight_copies([moe])
    assert kernel.renewed == 0  # FSDP may gather other weights into the same memory
    SingleStrategy().layout(moe)
    with captured_weight_copies([moe]):
        assert kernel.captures_weight_copies
        assert kernel.renewed == 1
    assert not kernel.captures_weight_copies
    renew_weight_copies([moe])
    assert kernel.renewed == 2


class Packs(LocalExchange):
    """Receives 3 rows a token, of 5 bytes."""

    rows_per_token = 3.0

    def row_bytes(self, width):
        return 5


def test_estimates_ask_the_exchange():
    """Selective recompute keeps rows as they arrive; a kernel saves them as it computes them."""
    moe = MoE(Workload(32, 48, 4, 2), backends={"experts": "torch"})
    moe.experts.exchange.rows_per_token = 3.0
    saved = [count(moe, 4) for count in (saved_by_ffn, kept_by_ffn)]
    moe.experts.exchange = Packs(moe.workload, None)
    packed = [count(moe, 4) for count in (saved_by_ffn, kept_by_ffn)]
    assert [a - b for a, b in zip(saved, packed)] == [0, 3 * (4 * 32 - 5)]


def sum_as_hopper_does(left, right, promoted):
    """Return left @ right.T with sums of 14 bits for each 32 numbers, and in float32 each 128.

    Without `promoted`, the sum is in 14 bits throughout. Bits that do not fit are cut off (Liu et
    al. 2024, arXiv 2412.19437, section 3.5.2).
    """
    whole = torch.zeros(len(left), len(right))
    part = torch.zeros_like(whole)
    for first in range(0, left.shape[1], 32):
        if promoted and first % BLOCK == 0:
            whole += part
            part = torch.zeros_like(part)
        part += left[:, first : first + 32] @ right[:, first : first + 32].T
        mantissa, exponent = torch.frexp(part)
        part = torch.ldexp((mantissa * 2**14).trunc() / 2**14, exponent)
    return whole + part


@pytest.mark.parametrize("promoted", [True, False])
def test_long_sums_need_promotion(promoted):
    """The kit's threshold for sums of 14336 positive numbers separates both."""
    left = dequantize(quantize_rows(torch.randn(16, 14336).abs()))
    right = dequantize(quantize_rows(torch.randn(16, 14336).abs()))
    want = left.double() @ right.double().T
    error = relative_error(sum_as_hopper_does(left, right, promoted), want)
    assert (error <= NEAR_IN_LONG_SUMS) == promoted
    assert promoted or error > 2 * NEAR_IN_LONG_SUMS


def record(name, value):
    """Replace pytest's record_property."""


def test_thresholds_are_those_of_the_recipe():
    """1.2 times the errors of the emulated layer: no looser, so that a wrong operand is seen."""
    errors = {}

    def keep(name, value):
        if name.startswith("error of "):
            errors[name.removeprefix("error of ")] = value

    for kit in (
        TestEmulatedExperts(),
        KeepsPreActivation(),
        WeightGradientsInFp8(),
        WeightGradientsInFp8OfKeptPreActivation(),
    ):
        kit.test_errors_of_the_recipe(keep)
        for name, largest in kit.largest_errors().items():
            assert 1.1 < largest / errors[name] < 1.35, (name, errors[name])


class HidesInfinity(EmulatedFp8Experts):
    """Saturates x before the largest magnitude of its block is taken."""

    def __call__(self, x, plan, topk_weights, weights):
        return super().__call__(x.clamp(-448, 448), plan, topk_weights, weights)


class DividesByZero(EmulatedFp8Experts):
    """Has no smallest scale."""

    def __call__(self, x, plan, topk_weights, weights):
        return super().__call__(x / x.any(1, keepdim=True), plan, topk_weights, weights)


@pytest.mark.parametrize(
    ("kernel", "test", "complaint"),
    [
        (
            TorchExperts,
            lambda kit: kit.test_matches_oracle(torch.bfloat16, "swiglu", False, record),
            "from the emulated layer, allowed",
        ),
        (
            HidesInfinity,
            lambda kit: kit.test_no_number_hides_nan_or_infinity(math.inf),
            "a token with inf has a finite output",
        ),
        (
            DividesByZero,
            Fp8ExpertsConformance.test_zeros_and_tiny_numbers,
            "a token of zeros has an output",
        ),
    ],
)
def test_the_kit_finds_wrong_kernels(kernel, test, complaint):
    class Kit(EmulatedConformance):
        def construct(self, *args, workload=None):
            return kernel(*args)

    with pytest.raises(AssertionError, match=complaint):
        test(Kit())
