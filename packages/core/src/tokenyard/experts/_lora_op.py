"""Register a kernel of experts with adapters as a torch operator."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from tokenyard.experts._lora_call import LoraCall, lora_call
from tokenyard.experts._register import FlatKernel, Signature
from tokenyard.interfaces import ExpertWeights, LowRank, Plan

TENSORS = (
    "x",
    "order",
    "inverse",
    "offsets",
    "topk_weights",
    "up",
    "down",
    "up_bias",
    "down_bias",
    "up_a",
    "up_b",
    "down_a",
    "down_b",
    "dropped",
    "mask",
)
"""The tensors of a call, in the order of the operator's arguments."""

_REQUIRED = ("x", "order", "inverse", "offsets", "up", "down")
_SCHEMA = ", ".join(f"Tensor{'' if name in _REQUIRED else '?'} {name}" for name in TENSORS)
_SIGNATURE = Signature(
    f"{_SCHEMA}, int top_k, float up_scale, float down_scale, str activation",
    tensors=len(TENSORS),
    constants=4,
    differentiable=(0, *range(4, 14)),
)
_NAMES = [TENSORS[position] for position in _SIGNATURE.differentiable]

Forward = Callable[..., tuple[Tensor, ...]]
"""``(call, **options)`` -> y [T, D], then the tensors to save for the backward pass.

It must not change or return a tensor of the call.
"""

Backward = Callable[..., dict[str, Tensor]]
"""``(dy, call, saved, wanted, **options)`` -> the gradients of the tensors named in `wanted`.

dy [T, D] may be strided. `saved` is the list of tensors that the forward pass returned after y. It
must not change or return a tensor of its arguments, but may overwrite `saved` if that is Donated.
"""

Saved = Callable[..., tuple[Tensor, ...]]
"""``(call, **options)`` -> uninitialised tensors with the shapes and dtypes that are saved."""


def register_lora_op(
    name: str, forward: Forward, backward: Backward, saved: Saved, saves: int, options: list[str]
) -> Callable[..., Tensor]:
    """Register a kernel of experts with adapters as the operators `name` and `name`_backward.

    `saves` is the number of tensors that `forward` returns after y, and that `saved` returns.
    `options` are further arguments of all three functions, each a string.

    Returns the function ``(x, plan, topk_weights, weights, low_rank, activation, **options) -> y``
    with y [T, D]. It supports autograd (once differentiable), torch.compile and fake tensors.
    Selective recompute keeps y and the saved tensors.
    """

    def gradients(
        dy: Tensor, call: LoraCall, saved: list[Tensor], needs: list[bool], **options: Any
    ) -> list[Tensor | None]:
        wanted = {name for name, need in zip(_NAMES, needs) if need}
        by_name = backward(dy, call, saved, wanted, **options)
        return [by_name[name] if name in wanted else None for name in _NAMES]

    typed = dict.fromkeys(options, str)
    kernel = FlatKernel(_SIGNATURE, lora_call, forward, gradients, saved, typed)
    return partial(_call, kernel.register(name, saves), tuple(options))


def _call(
    op: Any,
    options: tuple[str, ...],
    x: Tensor,
    plan: Plan,
    topk_weights: Tensor | None,
    weights: ExpertWeights,
    low_rank: LowRank,
    activation: str,
    **values: Any,
) -> Tensor:
    """Call an operator with the flat arguments of a call."""
    order, inverse, offsets, top_k = plan
    *matrices, up_scale, down_scale = low_rank
    constants = (top_k, up_scale, down_scale, activation, *(values[option] for option in options))
    tensors = (x, order, inverse, offsets, topk_weights, *weights, *matrices)
    y: Tensor = op(*tensors, *constants)[0]
    return y
