"""The interface of a kernel set: the module that launches the matmuls of an expert layer."""

from __future__ import annotations

import functools
import importlib
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar, cast

import torch
from torch import Tensor

from tokenyard.interfaces import Plan
from tokenyard_kernels_triton.few_rows_tiling import MOST_FEW_ROWS, MOST_OF_GRADIENT
from tokenyard_kernels_triton.gluon_tiling import Matmul
from tokenyard_kernels_triton.ops._row_tiles import RowTiles

KernelSetName = Literal["portable", "gluon", "few_rows", "few_rows_hopper"]
"""The kernel set for any GPU, the one for Hopper GPUs, or those for few rows an expert."""

Rows = TypeVar("Rows")
"""Rows [R, D] sorted by expert in a form other than a tensor, if the kernel set has one."""


class KernelSet(Protocol[Rows]):
    """The functions that each kernel set defines. They allocate what they return."""

    def rows_of(self, tokens: Tensor, plan: Plan, ffn_dim: int) -> Rows | Tensor:
        """Return the rows [R, D] of tokens [T, D] as an operand."""
        ...

    def up_and_activate(
        self,
        x: Rows | Tensor,
        up: Tensor,
        bias: Tensor | None,
        row_tiles: RowTiles,
        activation: str,
        keep_z: bool = True,
        keep_a: bool = True,
    ) -> tuple[Tensor, Tensor]:
        """Return z [R, 2F or F] and a [R, F] of rows x [R, D]; one that is not kept is empty."""
        ...

    def times_weight(
        self,
        rows: Rows | Tensor,
        weight: Tensor,
        bias: Tensor | None,
        row_tiles: RowTiles,
        transposed: bool,
        matmul: Matmul,
    ) -> Tensor:
        """Return rows [R, M] @ weight + bias, with each expert's weight and bias for its rows.

        The weight is [E, M, N], or [E, N, M] if `transposed`; the bias is [E, N].
        """
        ...

    def differentiate_down(
        self,
        drows: Rows | Tensor,
        down: Tensor,
        z: Tensor,
        dz: Tensor,
        order: Tensor,
        topk_weights: Tensor | None,
        row_tiles: RowTiles,
        activation: str,
    ) -> tuple[Tensor, Tensor]:
        """Write dz [R, 2F or F]; return the weighted activation [R, F], and dots [R, some].

        They are those of ``ops._gradient.differentiate`` for da = dy @ down. There is no bias.
        dz may be z.
        """
        ...

    def weight_gradient(
        self,
        left: Rows | Tensor,
        right: Rows | Tensor,
        row_tiles: RowTiles,
        matmul: Matmul,
        *,
        total: Tensor | None = None,
    ) -> Tensor:
        """Return [E, M, N]: left [R, M] transposed @ right [R, N] over each expert's rows.

        It is zero for an expert without rows. With a total [E, M, N] in float32, which is
        contiguous, add to that and return it.
        """
        ...


def fitting_set(name: KernelSetName, plan: Plan, dtype: torch.dtype) -> KernelSetName:
    """Return the name of a kernel set, or of the one for few rows if a plan has few an expert."""
    rows = plan.order.shape[0]
    experts = plan.offsets.shape[0] - 1
    if rows > MOST_FEW_ROWS * experts or dtype.itemsize != 2:
        return name
    hopper = name == "gluon" and rows > MOST_OF_GRADIENT * experts
    return "few_rows_hopper" if hopper else "few_rows"


@functools.cache
def kernel_set(name: KernelSetName) -> KernelSet[Any]:
    """Import a kernel set. The one for Hopper GPUs needs a Triton version with its Gluon names."""
    return cast(KernelSet[Any], importlib.import_module(f"tokenyard_kernels_triton.ops._{name}"))


if TYPE_CHECKING:  # mypy checks the modules against the protocol
    from tokenyard_kernels_triton.ops import _few_rows, _few_rows_hopper, _gluon, _portable
    from tokenyard_kernels_triton.ops._token_rows import TokenRows

    _OF_TENSORS: KernelSet[Tensor] = _portable
    _OF_TOKENS: tuple[KernelSet[TokenRows], ...] = (_gluon, _few_rows, _few_rows_hopper)
