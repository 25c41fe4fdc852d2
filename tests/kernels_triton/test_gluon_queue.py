"""Programs of Gluon matmuls take tiles from a queue, while others run, in any order."""

import pytest
import torch

from tokenyard.experts import rows_outer
from tokenyard.testing._compare import poisoned_memory
from tokenyard.tolerance import relative_error
from tokenyard_kernels_triton import _device
from tokenyard_kernels_triton.ops._gluon_operands import NARROW

from . import gluon_interpreter
from .test_gluon_matmuls import BF16, DEVICE, NEAR, Rows, operands, quantized_weights, random


@pytest.fixture(params=[1, 5], autouse=True)
def programs(request, monkeypatch):
    """On a CPU, run so many programs."""
    if DEVICE == "cpu":
        gluon_interpreter.install(monkeypatch)
        monkeypatch.setattr(_device, "_INTERPRETED_PROGRAMS", request.param)
        _device.processors.cache_clear()
    yield
    _device.processors.cache_clear()


def drop(rows, kept):
    """Let all rows but the first ones be dropped, and the tiles that exist with them."""
    rows.plan.offsets.clamp_(max=kept)
    rows.kept = min(rows.kept, kept)
    rows.tokens = rows.tokens[:kept]


@pytest.mark.parametrize("kept", [None, 65, 0])
@pytest.mark.parametrize("copied", [True, False], ids=["copied", "gathered"])
def test_matmuls_in_turns_have_one_tile_list(copied, kept):
    """Each leaves the counter at zero, also without a tile, and no result depends on the order."""
    from tokenyard_kernels_triton.ops import _gluon, _gluon_fp8

    rows = Rows(tokens=160, experts=4)
    if kept is not None:
        drop(rows, kept)
    tokens = random(rows.count, 128)
    x = tokens[rows.tokens]
    left = _gluon.rows_of(tokens, rows.plan, NARROW + 1 if copied else NARROW)
    down = random(rows.experts, 128, 384)
    in_fp8, numbers = operands(rows, copied, 128)
    weight, matrices = quantized_weights(rows.experts, 384, 128)
    up = random(rows.experts, 2 * 384, 128)
    start = torch.randn(rows.experts, 384, 128, device=DEVICE)

    def results():
        z = _gluon.times_weight(left, down, None, rows.tiles, False, "activation_gradient")
        counters = [rows.tiles.counter().item()]
        in_8_bits = _gluon_fp8.times_weight(in_fp8, weight, None, rows.tiles, True, BF16)
        counters += [rows.tiles.counter().item()]
        total = start.clone()
        _gluon.weight_gradient(z, left, rows.tiles, "up_gradient", total=total)
        counters += [rows.tiles.counter().item()]
        pre_activation, act = _gluon.up_and_activate(left, up, None, rows.tiles, "swiglu")
        counters += [rows.tiles.counter().item()]
        dz = torch.empty_like(pre_activation)
        weighted, dots = _gluon.differentiate_down(
            left, down, pre_activation, dz, rows.plan.order, None, rows.tiles, "swiglu"
        )
        assert [*counters, rows.tiles.counter().item()] == [0] * 5
        of_rows = (z, in_8_bits, pre_activation, act, dz, weighted, dots)
        return [*(result[: rows.kept] for result in of_rows), total]

    with poisoned_memory():
        first, *others = (results() for _ in range(3))
    for other in others:
        assert all(torch.equal(*both) for both in zip(other, first))
    z, in_8_bits, *_, total = first
    if not rows.kept:
        assert torch.equal(total, start)
        return
    assert relative_error(z, rows.product(x, down)) < NEAR
    assert relative_error(in_8_bits, rows.product(numbers, matrices.mT)) < NEAR
    want = rows_outer(z.double(), x.double(), rows.plan.offsets)
    assert relative_error(total - start.double(), want) < 1e-5
