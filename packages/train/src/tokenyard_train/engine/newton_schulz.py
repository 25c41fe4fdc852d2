"""Orthogonalise batches of matrices by the quintic Newton-Schulz iteration of Muon.

Jordan et al. 2024 iterate X <- (a I + b G + c G^2) X with G = X X^T. The polynomials of G commute,
so several iterations can be done on G, which is small if X is not square: G <- P G P with
P = a I + b G + c G^2, and one product with all P for X. Rounding of G would grow with each of these
iterations, so G is computed again from X after three.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of Jordan et al., and of ``torch.optim.Muon``
_EPS = 1e-7
_SCALE = 8.0  # of matrices of norm 1, whose small numbers float16 would lose
_ON_GRAM = 3  # iterations before G is computed again
_NARROW = 1.5  # longer / shorter side, from which iterations on G cost less than on X
_BATCH_NUMEL = 1 << 28  # numbers of the matrices that are orthogonalised at a time

Product = Callable[..., Tensor]
"""``(left, right, alpha, addend, beta, diagonal)``: alpha left right^T + beta addend + diagonal I.

left and right are [B, N, K]; the result is symmetric.
"""


def orthogonalize_(
    stacks: Sequence[Tensor], steps: int, factor: Callable[[int, int], float]
) -> None:
    """Replace matrices of stacks [B, R, C] by factor(R, C) times the nearest orthogonal ones.

    Stacks of one size are computed in batches, on a GPU in float16.
    """
    by_shape: dict[torch.Size, list[Tensor]] = {}
    for stack in stacks:
        by_shape.setdefault(stack.shape[-2:], []).append(stack)
    for (rows, columns), same in by_shape.items():
        times = factor(rows, columns) / _SCALE
        for batch in _batches(same, max(1, _BATCH_NUMEL // max(1, rows * columns))):
            results = newton_schulz(_normalized(batch), steps)
            for stack, result in zip(batch, results.split([len(stack) for stack in batch])):
                _scale(result, stack, times)


def newton_schulz(x: Tensor, steps: int) -> Tensor:
    """Return roughly `_SCALE` times the nearest orthogonal matrices to x [B, R, C] / `_SCALE`.

    These have singular values 1; the iteration brings those of x to between 0.7 and 1.2. The norm
    of each matrix x must be at most `_SCALE`.
    """
    tall = x.shape[-2] > x.shape[-1]
    short, long = sorted(x.shape[-2:])
    product = _kernel(x) or _product
    at_once = _ON_GRAM if long >= _NARROW * short else 1
    for first in range(0, steps, at_once):
        wide = x.mT if tall else x
        p = _polynomial(product(wide, wide), min(at_once, steps - first), product)
        x = x @ p if tall else p @ x
    return x


def _polynomial(gram: Tensor, steps: int, product: Product) -> Tensor:
    """Return the product of the polynomials of `steps` iterations. `gram` is `_SCALE`^2 * G."""
    a, b, c = _COEFFICIENTS
    p = product(gram, gram, c / _SCALE**4, gram, b / _SCALE**2, a)
    result = p
    for _ in range(1, steps):
        gram = product(p, product(p, gram))
        p = product(gram, gram, c / _SCALE**4, gram, b / _SCALE**2, a)
        result = product(p, result)
    return result


def _product(
    left: Tensor,
    right: Tensor,
    alpha: float = 1.0,
    addend: Tensor | None = None,
    beta: float = 1.0,
    diagonal: float = 0.0,
) -> Tensor:
    if addend is None:
        return left @ right.mT
    out = torch.baddbmm(addend, left, right.mT, beta=beta, alpha=alpha)
    out.diagonal(dim1=-2, dim2=-1).add_(diagonal)
    return out


def _normalized(stacks: Sequence[Tensor]) -> Tensor:
    """Return the matrices of all stacks [B, R, C], with norm `_SCALE`."""
    first = stacks[0]
    count = sum(len(stack) for stack in stacks)
    dtype = torch.float16 if first.is_cuda and first.dtype == torch.bfloat16 else first.dtype
    out = first.new_empty(count, *first.shape[-2:], dtype=dtype)
    wide = torch.promote_types(first.dtype, torch.float32)
    for stack, part in zip(stacks, out.split([len(stack) for stack in stacks])):
        norms = torch.linalg.vector_norm(stack, dim=(-2, -1), dtype=wide)
        _scale(stack, part, _SCALE, 1 / norms.clamp(min=_EPS))
    return out


def _scale(source: Tensor, out: Tensor, factor: float, factors: Tensor | None = None) -> None:
    """Write factor * factors [B] * source to out, both [B, R, C] and of any dtype."""
    contiguous = source[0].is_contiguous() and out[0].is_contiguous()
    if source.is_cuda and source.element_size() < 8 and contiguous and has_kernels():
        from tokenyard_kernels_triton.optimizer.muon import scale_matrices

        scale_matrices(source, out, factor, factors)
        return
    if factors is not None:
        source = source * factors[:, None, None]
    torch.mul(source, factor, out=out)


def _batches(stacks: Sequence[Tensor], most: int) -> Iterator[list[Tensor]]:
    """Gather stacks, and split large ones evenly, to batches of at most `most` matrices."""
    batch: list[Tensor] = []
    parts = (part for stack in stacks for part in _even_parts(stack, most))
    for part in parts:
        if batch and sum(map(len, batch)) + len(part) > most:
            yield batch
            batch = []
        batch.append(part)
    if batch:
        yield batch


def _even_parts(stack: Tensor, most: int) -> Sequence[Tensor]:
    parts = -(-len(stack) // most)
    return stack.tensor_split(parts) if parts else ()


def _kernel(x: Tensor) -> Product | None:
    """Return a kernel that computes half of a symmetric product, or None."""
    if not x.is_cuda or not has_kernels():
        return None
    from tokenyard_kernels_triton.optimizer.muon import multiplies, symmetric_product

    return symmetric_product if multiplies(x) else None


@cache
def has_kernels() -> bool:
    """Return whether tokenyard-kernels-triton is installed."""
    return None not in map(find_spec, ("triton", "tokenyard_kernels_triton"))
