"""The `triton` router: core's top-k router with its logits, selection and weights computed in few launches."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenyard.numerics import compute_dtype
from tokenyard.routers import TopKRouter
from tokenyard.workload import Workload
from tokenyard_kernels_triton._device import on_device_of
from tokenyard_kernels_triton.launching import compiling
from tokenyard_kernels_triton.ops._logits import logits_op
from tokenyard_kernels_triton.ops._quantize import split_in_two
from tokenyard_kernels_triton.ops._topk import select, weigh, weigh_gradient

_NARROW = (torch.bfloat16, torch.float16)


class TritonRouter(TopKRouter):
    """Scores tokens by one matrix and selects the K best experts, as ``workload.router`` says."""

    def __init__(self, workload: Workload):
        super().__init__(workload)
        self.workload = workload

    def logits(self, x: Tensor) -> Tensor:
        """Return x [T, D] times the router's weight, in float32: [T, E]."""
        narrow = compute_dtype(x)
        if narrow not in _NARROW:
            return super().logits(x)
        with torch.autocast(x.device.type, enabled=False):
            return logits_op(x.to(narrow), self.weight.to(narrow))

    def choose(self, logits: Tensor, topk_ids: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return ids and weights [T, K]; given ids are only weighted."""
        ids = (
            select(logits, self.selection_bias, self.top_k, self.rule)
            if topk_ids is None
            else topk_ids
        )
        return ids, weigh(logits, ids, self.rule)

    def prepare(self, tokens: int) -> None:
        """Compile the kernels for so many tokens, in parallel."""
        device, dtype = self.workload.device, self.workload.dtype
        logits = torch.empty(tokens, self.num_experts, device=device)
        bias = (
            None
            if self.selection_bias is None
            else torch.empty_like(self.selection_bias, device=device)
        )
        with compiling(), on_device_of(logits):
            ids = select(logits, bias, self.top_k, self.rule)
            weigh_gradient(weigh(logits, ids, self.rule), logits, ids, self.rule)
            if dtype in _NARROW:
                split_in_two(logits, dtype)
