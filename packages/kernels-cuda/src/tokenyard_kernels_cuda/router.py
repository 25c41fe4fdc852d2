"""The `cuda` router: core's top-k router with scores, selection and weights in one launch."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from tokenyard.dtypes import compute_dtype
from tokenyard.routers import TopKRouter
from tokenyard.workload import Workload
from tokenyard_kernels_cuda.ops._logits import NARROW, logits_kernels, logits_op
from tokenyard_kernels_cuda.ops._route_tokens import route_tokens
from tokenyard_kernels_cuda.ops._topk import route, route_kernels, weigh
from tokenyard_kernels_cuda.toolchain import compile_kernels


class CudaRouter(TopKRouter):
    """Scores tokens by one matrix and selects K experts by the rule ``workload.router``."""

    def __init__(self, workload: Workload):
        super().__init__(workload)
        self.workload = workload

    def prepare(self, tokens: int) -> None:
        """Compile and load the kernels, in parallel."""
        dtype = self.workload.dtype
        kernels = list(route_kernels(self.num_experts))
        if dtype in NARROW:
            kernels += logits_kernels(dtype)
        compile_kernels(kernels, self.workload.device)

    def route(self, x: Tensor, topk_ids: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return ids [T, K], weights [T, K] and logits [T, E] for x [T, D]."""
        narrow = compute_dtype(x)
        if topk_ids is not None or narrow not in NARROW:
            return super().route(x, topk_ids)
        with _without_autocast(x.device.type):
            weight = self.weight.to(narrow)
            return route_tokens(x.to(narrow), weight, self.selection_bias, self.top_k, self.rule)

    def logits(self, x: Tensor) -> Tensor:
        """Multiply x [T, D] by the router's weight; return logits [T, E] in float32."""
        narrow = compute_dtype(x)
        if narrow not in NARROW:
            return super().logits(x)
        with torch.autocast(x.device.type, enabled=False):
            return logits_op(x.to(narrow), self.weight.to(narrow))

    def choose(self, logits: Tensor, topk_ids: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return ids and weights [T, K]. If topk_ids is set, skip the selection."""
        if topk_ids is None:
            return route(logits, self.selection_bias, self.top_k, self.rule)
        return topk_ids, weigh(logits, topk_ids, self.rule)


def _without_autocast(device: str) -> AbstractContextManager[object]:
    """Disable autocast. Where it is off, nothing is set: that takes longer than a launch."""
    enabled = torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=False) if enabled else nullcontext()
