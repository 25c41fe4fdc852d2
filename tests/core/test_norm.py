"""The norm of many tensors together."""

import pytest
import torch

from tokenyard import norm
from tokenyard.norm import total_norm


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("large", [1, 100, 1 << 24], ids=["large", "both", "small"])
def test_the_norm_of_large_and_small_tensors(monkeypatch, dtype, large):
    """Relative to float64. The sum over all numbers is in float32 at least."""
    monkeypatch.setattr(norm, "_LARGE", large)
    shapes = [(7,), (16, 16), (), (3, 33, 5), (0, 4), (99,), (100,)]
    tensors = [torch.randn(shape).to(dtype) for shape in shapes]
    want = torch.cat([tensor.double().flatten() for tensor in tensors]).norm()
    got = total_norm(tensors)
    assert got.dtype == torch.promote_types(dtype, torch.float32)
    assert abs(got.double() - want) <= 4 * torch.finfo(got.dtype).eps * want


def test_large_numbers_of_16_bits_do_not_overflow():
    """Their squares are no numbers of float16."""
    tensors = [torch.full((1000,), 300.0, dtype=torch.float16)]
    assert total_norm(tensors) == pytest.approx(300 * 1000**0.5, rel=1e-6)


def test_a_number_that_is_not_finite_makes_the_norm_not_finite():
    tensors = [torch.ones(5), torch.tensor([1.0, torch.inf]), torch.ones(2)]
    assert total_norm(tensors) == torch.inf
    assert total_norm([torch.tensor([torch.nan]), *tensors]).isnan()


def test_the_norm_of_nothing_is_zero():
    assert total_norm([]) == 0
