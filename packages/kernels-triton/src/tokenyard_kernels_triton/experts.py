"""The `triton` and `gluon` experts: gather, two matmuls around the activation, weighted sum."""

from __future__ import annotations

import functools
import sys
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from tokenyard.activations import up_rows
from tokenyard.adapter import LoraAdapter
from tokenyard.errors import ConfigError
from tokenyard.experts import ExpertsCall, LoraCall, LoraPair
from tokenyard.fp8 import BLOCK, why_no_fp8
from tokenyard.interfaces import (
    ExpertWeights,
    GradientSums,
    LowRank,
    Permutation,
    Plan,
    logits_dtype,
)
from tokenyard.workload import Workload
from tokenyard_kernels_triton._device import on_device_of
from tokenyard_kernels_triton.fp8_advice import fp8_advice
from tokenyard_kernels_triton.ops._experts import compile_experts, experts
from tokenyard_kernels_triton.ops._fp8_weights import Copies, renew_weights
from tokenyard_kernels_triton.ops._kernel_set import KernelSetName
from tokenyard_kernels_triton.ops._lora import compile_lora, lora_experts
from tokenyard_kernels_triton.ops._low_rank import MAX_RANK
from tokenyard_kernels_triton.ops._save import Save, saved_bytes


class TritonExperts:
    """Experts computed by Triton kernels, without host syncs; differentiable once.

    `save` selects what the forward pass keeps for the backward pass besides x:

    * "pre_activation": 4KF bytes a token, in a 16-bit dtype and with a gated activation.
    * "fp8": the same in 8-bit blocks, 0.516 of the bytes. Gradients see a relative error of about
      2.5 % in the pre-activation; the output does not.
    * "recompute": nothing; the backward pass computes the pre-activation again.

    Raises ConfigError for another value.
    """

    kernels: ClassVar[KernelSetName] = "portable"
    max_lora_rank: int = MAX_RANK
    adds_to_sums = True

    def __init__(self, workload: Workload, permutation: Permutation, save: Save = "pre_activation"):
        if save not in get_args(Save):
            known = ", ".join(get_args(Save))
            raise ConfigError(f"backends.experts.save is {save!r}; known are: {known}")
        self.workload = workload
        self.activation = workload.activation
        self.save = save

    def saved_bytes_per_row(self, width: int) -> int:
        """Return the bytes saved for each row, besides x; `width` are those of the dtype."""
        columns = up_rows(self.activation, self.workload.ffn_dim)
        return saved_bytes(columns, self.save, width)

    def prepare(self, tokens: int) -> None:
        """Compile the kernels for batches of `tokens` tokens, in parallel.

        Until it returns, it allocates one layer's weights and gradients.
        """
        compile_experts(self._empty_call(tokens), self.save, self.kernels)

    def prepare_with_sums(self, tokens: int) -> None:
        """Compile the kernels for batches of `tokens` tokens, also those that add to sums."""
        call = self._empty_call(tokens)
        up, down = call.weights[:2]
        wide = functools.partial(torch.empty_like, dtype=torch.float32)
        compile_experts(call, self.save, self.kernels, GradientSums(wide(up), wide(down)))

    def prepare_with_adapter(self, tokens: int, adapter: LoraAdapter) -> None:
        """Compile the kernels for batches of `tokens` tokens, with an adapter on a frozen base."""
        x, plan, topk_weights, weights, activation = self._empty_call(tokens)
        rank = adapter.settings.rank
        dropout = adapter.settings.dropout > 0
        offsets = plan.offsets

        def pair(target: str) -> LoraPair | None:
            if target not in adapter.targets:
                return None
            experts, rows, columns = getattr(weights, target).shape
            a, b = x.new_empty(experts, rank, columns), x.new_empty(experts, rows, rank)
            return LoraPair(a, b, adapter.scale, offsets)

        up = pair("up")
        down = pair("down")
        dropped = torch.empty_like(x) if dropout and up else None
        shape = (plan.order.shape[0], weights.down.shape[2])
        mask = x.new_empty(shape, dtype=torch.bool) if dropout and down else None
        call = LoraCall(x, plan, topk_weights, weights, up, down, dropped, mask, activation)
        compile_lora(call, self.save, self.kernels)

    def _empty_call(self, tokens: int) -> ExpertsCall:
        """Return a call with undefined tensors."""
        w = self.workload
        experts = w.num_experts // w.expert_parallel
        slots = tokens * w.top_k
        rows = up_rows(w.activation, w.ffn_dim)
        values = functools.partial(torch.empty, dtype=w.dtype, device=w.device)
        indices = functools.partial(torch.empty, dtype=torch.int32, device=w.device)
        weights = ExpertWeights(
            values(experts, rows, w.dim),
            values(experts, w.dim, w.ffn_dim),
            values(experts, rows) if w.bias else None,
            values(experts, w.dim) if w.bias else None,
        )
        plan = Plan(indices(slots), indices(slots), indices(experts + 1), w.top_k)
        topk_weights = torch.empty(tokens, w.top_k, dtype=logits_dtype(w.dtype), device=w.device)
        return ExpertsCall(values(tokens, w.dim), plan, topk_weights, weights, w.activation)

    def __call__(
        self, x: Tensor, plan: Plan, topk_weights: Tensor | None, weights: ExpertWeights
    ) -> Tensor:
        """Return y [T, D] for unsorted tokens x [T, D]."""
        return experts(
            x, plan, topk_weights, weights, self.activation, save=self.save, kernels=self.kernels
        )

    def with_sums(
        self,
        x: Tensor,
        plan: Plan,
        topk_weights: Tensor | None,
        weights: ExpertWeights,
        sums: GradientSums,
    ) -> Tensor:
        """Return y [T, D] for unsorted tokens x [T, D]; gradients of weights are added to sums."""
        options = {"sums": sums, "save": self.save, "kernels": self.kernels}
        return experts(x, plan, topk_weights, weights, self.activation, **options)

    def with_adapter(
        self,
        x: Tensor,
        plan: Plan,
        topk_weights: Tensor | None,
        weights: ExpertWeights,
        low_rank: LowRank,
    ) -> Tensor:
        """Return y [T, D] for unsorted tokens x [T, D], with adapters beside the weights."""
        activation = self.activation
        options = {"save": self.save, "kernels": self.kernels}
        return lora_experts(x, plan, topk_weights, weights, low_rank, activation, **options)


class GluonExperts(TritonExperts):
    """Experts for Hopper GPUs, with matmuls in Gluon whose warps load or multiply.

    With `precision` "fp8", the matmuls of the forward pass and both gradients of data multiply
    numbers in float8 e4m3 (``tokenyard.fp8``). So do gradients of weights with `weight_gradients`
    "fp8"; else they multiply 16 bits. `save` is "fp8" by default then. The weights stay in 16 bits:
    their float8 copies are made by each pass, or kept until the weights change if
    `weights_have_versions`.

    Raises ConfigError for another precision, and for widths that FP8 cannot compute.
    """

    kernels = "gluon"
    # See ``tokenyard.interfaces.CachingExpertKernel``.
    weights_have_versions = False
    captures_weight_copies = False

    def __init__(
        self,
        workload: Workload,
        permutation: Permutation,
        save: Save | None = None,
        precision: Literal["fp8"] | None = None,
        weight_gradients: Literal["fp8"] | None = None,
    ):
        if precision not in ("fp8", None):
            raise ConfigError(
                f"backends.experts.precision is {precision!r}; known is: fp8, and without it "
                "matmuls have the dtype of x"
            )
        reason = why_no_fp8(workload.dim, workload.ffn_dim) if precision == "fp8" else None
        if reason is not None:
            raise ConfigError(f"experts backend 'gluon' is unusable here: {reason}")
        if weight_gradients not in (precision, None):
            raise ConfigError(
                f"backends.experts.weight_gradients is {weight_gradients!r}; known is: fp8, with "
                "precision: fp8"
            )
        super().__init__(workload, permutation, save or precision or "pre_activation")
        self.precision = precision
        self.weights_fp8 = weight_gradients == "fp8"
        if precision == "fp8":
            self.adds_to_sums = False
            self.max_lora_rank = sys.maxsize  # else core would compute adapters, in 16 bits
            # Imported here, because `TritonExperts` runs without the names of Gluon.
            from tokenyard_kernels_triton.ops._fp8_experts import compile_fp8_experts, fp8_experts

            self._compile_in_fp8 = compile_fp8_experts
            self._in_fp8 = fp8_experts

    def prepare(self, tokens: int) -> None:
        """Compile the kernels for batches of `tokens` tokens, in parallel."""
        if self.precision == "fp8":
            self._compile_in_fp8(self._empty_call(tokens), self.save, self.weights_fp8)
        else:
            super().prepare(tokens)

    def prepare_with_adapter(self, tokens: int, adapter: LoraAdapter) -> None:
        """Compile the kernels with an adapter. Raises ConfigError in FP8, which has none."""
        self._check_no_fp8()
        super().prepare_with_adapter(tokens, adapter)

    def weight_copy_bytes(self, numbers: int) -> int:
        """Return the bytes kept of so many numbers of weights: two layouts, and scales."""
        return 0 if self.precision is None else 2 * numbers + 4 * numbers // BLOCK**2

    def advice(self, keeps_copies: bool) -> str | None:
        """Return what FP8 would change; None in FP8, and where it cannot be used."""
        if self.precision is not None:
            return None
        saved_per_row = self.saved_bytes_per_row(self.workload.dtype.itemsize)
        return fp8_advice(self.workload, saved_per_row, keeps_copies)

    def renew_weight_copies(self, weights: ExpertWeights) -> None:
        """Quantize weights that changed, in the memory that CUDA graphs read."""
        if self.precision is not None:
            with on_device_of(weights.up):
                for weight in weights[:2]:
                    renew_weights(weight.detach())

    def _copies(self) -> Copies:
        if not self.weights_have_versions:
            return "none"
        return "captured" if self.captures_weight_copies else "kept"

    def __call__(
        self, x: Tensor, plan: Plan, topk_weights: Tensor | None, weights: ExpertWeights
    ) -> Tensor:
        """Return y [T, D] for unsorted tokens x [T, D]."""
        if self.precision is None:
            return super().__call__(x, plan, topk_weights, weights)
        # A cast under autocast has no version that counts: a compiler may reuse its memory.
        parameters = all(isinstance(weight, nn.Parameter) for weight in weights[:2])
        return self._in_fp8(
            x,
            plan,
            topk_weights,
            weights,
            self.activation,
            save=self.save,
            copies=self._copies() if parameters else "none",
            weights_fp8=self.weights_fp8,
        )

    def with_sums(
        self,
        x: Tensor,
        plan: Plan,
        topk_weights: Tensor | None,
        weights: ExpertWeights,
        sums: GradientSums,
    ) -> Tensor:
        """Return y [T, D] for unsorted tokens x [T, D]. In FP8 nothing is added to sums."""
        return super().with_sums(x, plan, topk_weights, weights, sums)

    def with_adapter(
        self,
        x: Tensor,
        plan: Plan,
        topk_weights: Tensor | None,
        weights: ExpertWeights,
        low_rank: LowRank,
    ) -> Tensor:
        """Return y [T, D] with adapters. Raises ConfigError in FP8, which has none."""
        self._check_no_fp8()
        return super().with_adapter(x, plan, topk_weights, weights, low_rank)

    def _check_no_fp8(self) -> None:
        """Raise ConfigError in FP8, in which no kernel computes adapters."""
        if self.precision is not None:
            raise ConfigError(
                "backends.experts.precision is fp8, and experts with adapters have none; "
                "leave the precision out"
            )
