"""Gradients of experts over several microbatches, to which expert kernels add in place."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from tokenyard import Experts, moe_layers
from tokenyard.interfaces import GradientSums


class ExpertSums:
    """Lets expert kernels add to the float32 gradients of their weights.

    Autograd would add a gradient that the kernel wrote: 12 bytes a number instead of 8 with
    bfloat16 weights. Layers that cannot add (see ``Experts.can_add``) are left to autograd, and so
    are all layers if there are several ranks: strategies sum the gradient of each backward pass.
    With `keep`, the gradients of all steps are in the same memory, as a CUDA graph needs.
    """

    def __init__(self, model: nn.Module, ranks: int, keep: bool):
        self.layers: list[Experts] = [moe.experts for moe in moe_layers(model) if ranks == 1]
        self.keep = keep
        self._kept: dict[Experts, GradientSums] = {}

    @contextmanager
    def adding(self) -> Iterator[None]:
        """Context of the microbatches of a step: ``.grad`` is zero, and kernels add to it."""
        adding = [experts for experts in self.layers if experts.can_add]
        try:
            for experts in adding:
                experts.gradient_sums = self._zeros(experts)
                for weight, total in zip((experts.up, experts.down), experts.gradient_sums):
                    weight.grad_dtype = None  # the gradient may have any dtype
                    weight.grad = total
            yield
        finally:
            for experts in adding:
                experts.gradient_sums = None

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Context in which kernels return gradients."""
        before = [experts.gradient_sums for experts in self.layers]
        try:
            for experts in self.layers:
                experts.gradient_sums = None
            yield
        finally:
            for experts, sums in zip(self.layers, before):
                experts.gradient_sums = sums

    def _zeros(self, experts: Experts) -> GradientSums:
        sums = self._kept.get(experts)
        if sums is None:
            sums = GradientSums(_zeros_like(experts.up), _zeros_like(experts.down))
            if self.keep:
                self._kept[experts] = sums
        else:
            torch._foreach_zero_(list(sums))
        return sums


def _zeros_like(weight: Tensor) -> Tensor:
    wide = torch.promote_types(weight.dtype, torch.float32)
    return torch.zeros_like(weight.detach(), dtype=wide)
