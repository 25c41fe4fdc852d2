"""The `cuda` router: core's top-k router whose scores, selection and weights are one launch."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenyard.dtypes import compute_dtype
from tokenyard.routers import TopKRouter
from tokenyard.workload import Workload
from tokenyard_kernels_cuda.ops._logits import NARROW, logits_op, split_kernel
from tokenyard_kernels_cuda.ops._topk import route, routes, weigh
from tokenyard_kernels_cuda.toolchain import compile_kernels


class CudaRouter(TopKRouter):
    """Scores tokens by one matrix and selects the K best experts, as ``workload.router`` says."""

    def __init__(self, workload: Workload):
        super().__init__(workload)
        self.workload = workload

    def prepare(self, tokens: int) -> None:
        """Compile the kernels, in parallel."""
        dtype = self.workload.dtype
        kernels = list(routes(self.num_experts))
        if dtype in NARROW:
            kernels.append(split_kernel(dtype))
        compile_kernels(kernels, self.workload.device)

    def logits(self, x: Tensor) -> Tensor:
        """Return x [T, D] times the router's weight, in float32: [T, E]."""
        narrow = compute_dtype(x)
        if narrow not in NARROW:
            return super().logits(x)
        with torch.autocast(x.device.type, enabled=False):
            return logits_op(x.to(narrow), self.weight.to(narrow))

    def choose(self, logits: Tensor, topk_ids: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return ids and weights [T, K]; given ids are only weighted."""
        if topk_ids is None:
            return route(logits, self.selection_bias, self.top_k, self.rule)
        return topk_ids, weigh(logits, topk_ids, self.rule)
