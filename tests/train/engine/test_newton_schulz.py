"""The iteration on Gram matrices against the plain one in float64."""

import pytest
import torch
from torch import nn

from tokenyard.tolerance import relative_error
from tokenyard_train.engine import newton_schulz
from tokenyard_train.engine.newton_schulz import orthogonalize_

SHAPES = [(6, 20), (20, 6), (8, 8), (6, 8), (1, 5)]


def plain(x, steps=5):
    """Return the iteration of Jordan et al. 2024 on a matrix."""
    a, b, c = 3.4445, -4.7750, 2.0315
    if len(x) > len(x.mT):
        return plain(x.mT, steps).mT
    x = x / x.norm()
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


def by_torch(x):
    """Return what ``torch.optim.Muon`` subtracts for a gradient x that is not tall."""
    weight = nn.Parameter(torch.zeros_like(x))
    weight.grad = x
    torch.optim.Muon([weight], lr=1.0, weight_decay=0.0, momentum=0.0, nesterov=False).step()
    return -weight.detach()


@pytest.mark.parametrize("steps", [1, 3, 5, 7])
def test_stacks_of_any_sizes_equal_the_plain_iteration(monkeypatch, steps):
    """Stacks of one size are gathered, and split where they are too large; two are views."""
    monkeypatch.setattr(newton_schulz, "_BATCH_NUMEL", 500)
    stacks = [torch.randn(count, *shape).double() for shape in SHAPES for count in (1, 7, 0, 2)]
    stacks.append(torch.randn(3, 12, 20).double().split([6, 6], dim=1)[1])
    stacks.append(torch.randn(2, 20, 6).double().mT)
    before = [stack.clone() for stack in stacks]
    orthogonalize_(stacks, steps, lambda rows, columns: rows + 10 * columns)
    for stack, old in zip(stacks, before):
        for x, matrix in zip(stack, old):
            want = (x.shape[0] + 10 * x.shape[1]) * plain(matrix, steps)
            assert relative_error(x, want) < 1e-12


def test_zeros_stay_zeros():
    stack = torch.zeros(2, 4, 8)
    orthogonalize_([stack], 5, lambda rows, columns: 1.0)
    assert not stack.any()


@pytest.mark.parametrize("decay", [0.0, 1.0, 1.5, 3.0])
@pytest.mark.parametrize("shape", [(64, 176), (64, 64)])
def test_float16_is_nearer_to_float64_than_torch_in_bfloat16(decay, shape):
    """Singular values i ** -decay: iterations on Gram matrices are the harder the smaller some are.

    The matrix has been rounded to bfloat16, as torch rounds it.
    """
    u, _, v = torch.linalg.svd(torch.randn(shape).double(), full_matrices=False)
    values = torch.arange(1, 65).double() ** -decay
    x = ((u * values) @ v).bfloat16()
    scaled = (8 * x.float() / x.float().norm()).half()
    ours = newton_schulz.newton_schulz(scaled[None], 5)[0] / 8
    assert ours.dtype == torch.float16
    want = plain(x.double())
    assert relative_error(ours, want) < 0.6 * relative_error(by_torch(x.float()), want)
