"""The `triton` router: core's top-k router with logits, selection and weights in few launches."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenyard.dtypes import compute_dtype
from tokenyard.routers import TopKRouter
from tokenyard.workload import Workload
from tokenyard_kernels_triton._device import on_device_of
from tokenyard_kernels_triton.launching import compiling
from tokenyard_kernels_triton.ops._logits import logits_op
from tokenyard_kernels_triton.ops._quantize import split_in_two
from tokenyard_kernels_triton.ops._topk import select, weigh, weigh_gradient

_HALF = (torch.bfloat16, torch.float16)


class TritonRouter(TopKRouter):
    """Top-k router that scores tokens by one matrix; ``workload.router`` is its rule."""

    def __init__(self, workload: Workload):
        super().__init__(workload)
        self.workload = workload

    def logits(self, x: Tensor) -> Tensor:
        """Return the logits [T, E] of x [T, D] in float32."""
        dtype = compute_dtype(x)
        if dtype not in _HALF:
            return super().logits(x)
        with torch.autocast(x.device.type, enabled=False):
            return logits_op(x.to(dtype), self.weight.to(dtype))

    def choose(self, logits: Tensor, topk_ids: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return ids and weights [T, K]; with topk_ids, those ids and their weights."""
        if topk_ids is None:
            topk_ids = select(logits, self.selection_bias, self.top_k, self.rule)
        return topk_ids, weigh(logits, topk_ids, self.rule)

    def prepare(self, tokens: int) -> None:
        """Compile the kernels for batches of `tokens` tokens, in parallel."""
        device = self.workload.device
        dtype = self.workload.dtype
        logits = torch.empty(tokens, self.num_experts, device=device)
        bias = self.selection_bias
        if bias is not None:
            bias = torch.empty_like(bias, device=device)
        with compiling(), on_device_of(logits):
            ids = select(logits, bias, self.top_k, self.rule)
            weigh_gradient(weigh(logits, ids, self.rule), logits, ids, self.rule)
            if dtype in _HALF:
                split_in_two(logits, dtype)
