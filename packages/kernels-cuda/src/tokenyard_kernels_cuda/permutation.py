"""The `cuda` permutation: plans in two launches without host waits, and moves of 16 bytes a thread."""

from __future__ import annotations

from torch import Tensor

from tokenyard.interfaces import Plan
from tokenyard.workload import Workload
from tokenyard_kernels_cuda.ops._moves import ELEMENTS, moves, vectors_of
from tokenyard_kernels_cuda.ops._permutation import permute_op, unpermute_op
from tokenyard_kernels_cuda.ops._plan import KERNELS, plan_op
from tokenyard_kernels_cuda.toolchain import compile_kernels


class CudaPermutation:
    """Plans and moves by CUDA kernels; repeatable bit by bit."""

    def __init__(self, workload: Workload):
        self.workload = workload

    def prepare(self, tokens: int) -> None:
        """Compile the kernels, in parallel."""
        dtype = self.workload.dtype
        moving = moves(dtype, vectors_of(dtype)[0])[1:] if dtype in ELEMENTS else ()
        compile_kernels([*KERNELS, *moving], self.workload.device)

    def plan(self, topk_ids: Tensor, num_experts: int, rows: int | None = None) -> Plan:
        """Sort the slots of topk_ids [T, K] by expert, stably; dropped ones go last, into the tail."""
        slots = topk_ids.numel()
        order, inverse, offsets = plan_op(
            topk_ids, num_experts, slots if rows is None else min(rows, slots)
        )
        return Plan(order, inverse, offsets, topk_ids.shape[1])

    def permute(self, x: Tensor, plan: Plan) -> Tensor:
        """Copy tokens x [T, D] to their rows [R, D]; the tail is zero."""
        return permute_op(x, *plan)

    def unpermute(self, rows: Tensor, plan: Plan, topk_weights: Tensor | None) -> Tensor:
        """Sum each token's rows [R, D], weighted if weights [T, K] are given, to [T, D]."""
        return unpermute_op(rows, topk_weights, *plan)
