"""The `cuda` permutation: a plan takes two launches and no host sync; threads move 16 bytes."""

from __future__ import annotations

from torch import Tensor

from tokenyard.interfaces import Plan
from tokenyard.workload import Workload
from tokenyard_kernels_cuda.ops._moves import ELEMENTS, move_kernels, vectors_of
from tokenyard_kernels_cuda.ops._permutation import permute_op, unpermute_op
from tokenyard_kernels_cuda.ops._plan import KERNELS, plan_op
from tokenyard_kernels_cuda.toolchain import compile_kernels


class CudaPermutation:
    """Makes plans and moves rows with CUDA kernels. Results are bit-identical from run to run."""

    def __init__(self, workload: Workload):
        self.workload = workload

    def prepare(self, tokens: int) -> None:
        """Compile and load the kernels, in parallel."""
        dtype = self.workload.dtype
        kernels = list(KERNELS)
        if dtype in ELEMENTS:
            kernels += move_kernels(dtype, vectors_of(dtype)[0]).kernels()
        compile_kernels(kernels, self.workload.device)

    def plan(self, topk_ids: Tensor, num_experts: int, rows: int | None = None) -> Plan:
        """Sort the slots of topk_ids [T, K] by expert, stably; dropped slots come last.

        `rows` bounds the rows of the plan; the default is one row per slot.
        """
        slots = topk_ids.numel()
        order, inverse, offsets = plan_op(
            topk_ids, num_experts, slots if rows is None else min(rows, slots)
        )
        return Plan(order, inverse, offsets, topk_ids.shape[1])

    def permute(self, x: Tensor, plan: Plan) -> Tensor:
        """Copy tokens x [T, D] to their rows [R, D]; the tail is zero."""
        return permute_op(x, *plan)

    def unpermute(self, rows: Tensor, plan: Plan, topk_weights: Tensor | None) -> Tensor:
        """Sum each token's rows [R, D] to [T, D], weighted by topk_weights [T, K] unless None."""
        return unpermute_op(rows, topk_weights, *plan)
