"""The passes over memory of Muon, and its products of matrices, on a GPU."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from tokenyard_kernels_triton._device import ceil_div, on_device_of, runs_gluon
from tokenyard_kernels_triton.kernels import _muon
from tokenyard_kernels_triton.launching import launch

_BLOCK = 2048  # elements of a program
_FLOATS = (torch.float32, torch.bfloat16)


def supports(*tensors: Tensor) -> bool:
    """Return whether `nesterov` and `descend` support tensors.

    They must be contiguous, on a GPU, and in float32 or bfloat16.
    """
    return all(t.is_cuda and t.is_contiguous() and t.dtype in _FLOATS for t in tensors)


def nesterov(gradient: Tensor, momentum: Tensor, scale: Tensor, beta: float) -> Tensor:
    """Move the momentum m to the gradient by 1 - beta; return their mean beta m + (1 - beta) g.

    The mean is in bfloat16. `scale` [] multiplies the gradient. If it is not finite, m stays as it
    is, and is returned.
    """
    update = torch.empty_like(momentum, dtype=torch.bfloat16)
    size = momentum.numel()
    with on_device_of(momentum):
        launch(_muon.nesterov, (max(1, ceil_div(size, _BLOCK)),))(
            gradient, momentum, update, scale, size, beta, BLOCK=_BLOCK, num_warps=8
        )
    increment_version([momentum])
    return update


def descend(master: Tensor, weight: Tensor, direction: Tensor, rate: Tensor, decay: Tensor) -> None:
    """Set a master to decay * master - rate * direction, and the weight to the rounded master.

    Both may be one tensor. `rate` and `decay` are float32 scalars on the GPU.
    """
    size = master.numel()
    with on_device_of(master):
        launch(_muon.descend, (max(1, ceil_div(size, _BLOCK)),))(
            direction,
            master,
            weight,
            rate,
            decay,
            size,
            HAS_MASTER=weight is not master,
            BLOCK=_BLOCK,
            num_warps=8,
        )
    increment_version([master, weight])


def scale_matrices(
    source: Tensor, out: Tensor, factor: float, factors: Tensor | None = None
) -> None:
    """Write factor * factors * source to out, matrices [B, R, C] in 16 or 32 bits.

    `factors` [B] is float32. Each matrix is contiguous, but not the stack.
    """
    count, rows, columns = source.shape
    size = rows * columns
    blocks = ceil_div(size, _BLOCK)
    with on_device_of(out):
        launch(_muon.scale_matrices, (count * blocks,))(
            source,
            out,
            factors,
            factor,
            size,
            blocks,
            source.stride(0),
            out.stride(0),
            BLOCK=_BLOCK,
            num_warps=8,
        )
    increment_version([out])


def multiplies(x: Tensor) -> bool:
    """Return whether `symmetric_product` computes products of matrices [B, R, C] like x.

    It needs what Gluon needs, float16 or bfloat16, and rows of whole 16 bytes in x and the results.
    """
    return (
        runs_gluon(x.device)
        and x.dtype in (torch.float16, torch.bfloat16)
        and x.shape[-1] % 8 == 0
        and x.shape[-2] % 8 == 0
    )


def symmetric_product(
    left: Tensor,
    right: Tensor,
    alpha: float = 1.0,
    addend: Tensor | None = None,
    beta: float = 1.0,
    diagonal: float = 0.0,
) -> Tensor:
    """Return alpha * left @ right^T + beta * addend + diagonal * I, which must be symmetric.

    Half of it is computed. left and right [B, N, K] are contiguous, or transposed views of
    contiguous tensors; the addend is [B, N, N].
    """
    # Imported here, because the other functions run without the names of Gluon.
    from tokenyard_kernels_triton.ops import _symmetric

    out = left.new_empty(left.shape[0], left.shape[1], left.shape[1])
    with on_device_of(out):
        _symmetric.symmetric_product(left, right, out, alpha, addend, beta, diagonal)
    return out
