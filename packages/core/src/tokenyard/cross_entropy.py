"""The head of a language model: logits, or the loss of given targets in chunks of tokens.

Logits [T, V] never exist as a whole, and no gradient of their size is kept. The forward pass
computes the gradients of a chunk while its logits exist, so the head takes three matmuls, as it
does without chunks. Source: Liger Kernel (Hsu et al. 2024, arXiv 2410.10989, section 3.2).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from tokenyard.dtypes import compute_dtype
from tokenyard.interfaces import IGNORED, Balance, Output, Targets, TokenLoss, logits_dtype
from tokenyard.operators import operator

_CHUNK_LOGITS = 2**27  # logits of a chunk: 512 MiB in float32


class _Gradients(NamedTuple):
    """Gradients of the loss, filled chunk by chunk; None if not needed."""

    x: Tensor | None  # [T, D], in the compute dtype
    weight: Tensor | None  # [V, D], in float32 at least


def predict(
    x: Tensor, weight: Tensor, balances: Iterable[Balance], targets: Targets | None = None
) -> Output | TokenLoss:
    """Return a model's result for hidden states x [B, S, D] and the head's weight [V, D].

    The result is an Output with logits, or for given `targets` a TokenLoss.
    """
    if targets is None:
        return Output(F.linear(x, weight), tuple(balances))
    return TokenLoss(linear_cross_entropy(x, weight, targets), tuple(balances))


def linear_cross_entropy(
    x: Tensor, weight: Tensor, targets: Targets, chunk: int | None = None
) -> Tensor:
    """Return the weighted sum of the cross-entropies of all tokens in nats, a float64 scalar.

    The logits of x [..., D] are ``x @ weight.T`` for weight [V, D], computed in the compute dtype.
    Their softmax is computed in float32 at least. `chunk` is the number of tokens whose logits
    exist at a time. Differentiable once, in x and weight.
    """
    flat = x.reshape(-1, x.shape[-1])
    if not torch.is_grad_enabled():  # `needs_input_grad` ignores no_grad
        flat = flat.detach()
        weight = weight.detach()
    nats: Tensor = _LinearCrossEntropy.apply(
        flat,
        weight,
        targets.ids.reshape(-1),
        None if targets.weights is None else targets.weights.reshape(-1),
        chunk or _chunk_tokens(weight.shape[0]),
    )
    return nats


def loss_bytes(tokens: int, vocabulary: int, dim: int, width: int) -> int:
    """Return the peak bytes that the loss of `tokens` tokens allocates.

    `width` is the size of the compute dtype in bytes. A chunk holds logits in this dtype and their
    softmax in float32 at least. The gradients of x and of the weight are kept.
    """
    wide = max(width, 4)
    chunk = min(tokens, _chunk_tokens(vocabulary))
    return chunk * vocabulary * (width + wide) + vocabulary * dim * wide + tokens * dim * width


def _chunk_tokens(vocabulary: int) -> int:
    return max(1, _CHUNK_LOGITS // vocabulary)


class _LinearCrossEntropy(torch.autograd.Function):
    """The sum of the cross-entropies; its gradients are computed in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, ids: Tensor, token_weights: Tensor | None, chunk: int
    ) -> Tensor:
        """Return the loss, and save its gradients if any is needed."""
        dtype = compute_dtype(x)
        narrow_x = x.to(dtype)
        narrow_weight = weight.to(dtype)
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        gradients = _Gradients(
            torch.empty_like(narrow_x) if needs_x else None,
            torch.zeros_like(weight, dtype=logits_dtype(dtype)) if needs_weight else None,
        )
        ctx.dtypes = (x.dtype, weight.dtype)
        ctx.save_for_backward(*gradients)
        with torch.autocast(x.device.type, enabled=False):
            return _loss(narrow_x, narrow_weight, ids, token_weights, chunk, gradients)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        """Scale the saved gradients."""
        scaled = [
            None if gradient is None else _scaled(gradient, dloss, dtype)
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes)
        ]
        return *scaled, None, None, None


def _scaled(gradient: Tensor, dloss: Tensor, dtype: torch.dtype) -> Tensor:
    """Return gradient * dloss in `dtype`.

    The factor has one dimension, so that the product is computed in its dtype: on a GPU a scalar is
    rounded to the gradient's.
    """
    factor = dloss.to(logits_dtype(gradient.dtype)).reshape(1)
    return torch.mul(gradient, factor, out=torch.empty_like(gradient, dtype=dtype))


def _loss(
    x: Tensor,
    weight: Tensor,
    ids: Tensor,
    token_weights: Tensor | None,
    chunk: int,
    gradients: _Gradients,
) -> Tensor:
    """Return the loss of tokens x [T, D], and fill the gradients."""
    counted = ids != IGNORED
    ids = ids.where(counted, 0)  # [T]
    scale = counted.to(logits_dtype(x.dtype))  # [T]
    if token_weights is not None:
        scale = scale * token_weights.to(scale)
    total = torch.zeros((), dtype=torch.float64, device=x.device)
    for first in range(0, x.shape[0], chunk):
        rows = slice(first, first + chunk)
        logits = x[rows] @ weight.T  # [C, V]
        # [C]; logits are overwritten. By torch's dispatcher, which finds the device's kernel
        nats = _replace_by_gradient.op(logits, ids[rows], scale[rows])
        total += nats.sum(dtype=torch.float64)
        if gradients.x is not None:
            torch.mm(logits, weight, out=gradients.x[rows])
        if gradients.weight is not None:
            _add_matmul(gradients.weight, logits.T, x[rows])
        del logits  # or the next chunk is computed beside it
    return total


def replace_by_gradient(logits: Tensor, ids: Tensor, scale: Tensor) -> Tensor:
    """Return scale * cross-entropy [C] of logits [C, V]; overwrite them with their gradient.

    The gradient is scale * (softmax - onehot). `scale` [C] is float32 at least; tokens of scale 0
    have no loss, whatever their logits. A package may register a faster kernel for a device with
    ``torch.library.impl("tokenyard::replace_by_gradient", device)``.
    """
    wide = torch.log_softmax(logits, -1, dtype=scale.dtype)
    nats = -wide.gather(1, ids.unsqueeze(1)).squeeze(1) * scale
    wide.exp_()
    _subtract_at(wide, ids)
    torch.mul(wide, scale.unsqueeze(1), out=logits)
    logits.masked_fill_((scale == 0).unsqueeze(1), 0)
    return nats.where(scale != 0, 0)


_replace_by_gradient = operator(
    "tokenyard::replace_by_gradient", "(Tensor(a!) logits, Tensor ids, Tensor scale) -> Tensor"
)(replace_by_gradient)


def _subtract_at(logits: Tensor, ids: Tensor) -> None:
    """Subtract 1 from the entries of logits [C, V] at ids [C], in place.

    A flat index, since scatter_add_ has a deterministic algorithm in one dimension only.
    """
    index = torch.arange(0, logits.numel(), logits.shape[1], device=ids.device) + ids
    logits.view(-1).scatter_add_(0, index, logits.new_full(index.shape, -1))


def _add_matmul(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a @ b to `total` in place, summed in the dtype of `total`."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif total.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total += a.to(total) @ b.to(total)
