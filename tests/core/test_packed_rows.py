"""Rows in FP8 in one buffer: what `pack_rows` and `unpack_rows` promise."""

import math

import pytest
import torch

from tokenyard.fp8 import dequantize, quantize_rows
from tokenyard.packed_rows import (
    pack_plainly,
    pack_rows,
    packed_width,
    unpack_rows,
    unpacked_width,
)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [5, 0])
def test_rows_come_back_as_the_recipe_rounds_them(dtype, count):
    rows = torch.randn(count, 384).exp().to(dtype)
    packed = pack_rows(rows)
    assert packed.dtype == torch.uint8
    assert packed.shape == (count, 384 + 4 * 3)
    assert torch.equal(unpack_rows(packed, dtype), dequantize(quantize_rows(rows)).to(dtype))


def test_widths():
    for dim in (128, 384, 6144):
        assert unpacked_width(packed_width(dim)) == dim


def test_nan_stays_and_infinity_makes_nan_of_its_block():
    rows = torch.randn(2, 256)
    rows[0, 7] = math.nan
    rows[1, 7] = math.inf
    got = unpack_rows(pack_rows(rows), torch.float32)
    assert got[0].isnan().nonzero().tolist() == [[7]]
    assert got[1].isnan().tolist() == [column < 128 for column in range(256)]


def test_experts_in_fp8_round_received_rows_to_the_same_numbers():
    """The second rounding changes scales by the rounding of bfloat16, and no number of e4m3."""
    rows = torch.randn(500, 256) * torch.randn(500, 1).exp()
    first = quantize_rows(rows)
    second = quantize_rows(unpack_rows(pack_rows(rows), torch.bfloat16))
    assert torch.equal(second.values.float(), first.values.float())
    torch.testing.assert_close(second.scales, first.scales, rtol=2**-8, atol=0)


def test_a_package_may_have_a_kernel_for_a_device():
    calls = []

    def kernel(rows):
        calls.append(len(rows))
        return pack_plainly(rows)

    with torch.library._scoped_library("tokenyard", "IMPL") as library:
        library.impl("pack_rows", kernel, "CPU")
        pack_rows(torch.randn(3, 128))
    pack_rows(torch.randn(4, 128))
    assert calls == [3]


def test_operators():
    rows = torch.randn(3, 256)
    torch.library.opcheck(torch.ops.tokenyard.pack_rows.default, (rows,))
    packed = pack_rows(rows)
    torch.library.opcheck(torch.ops.tokenyard.unpack_rows.default, (packed, torch.bfloat16))
