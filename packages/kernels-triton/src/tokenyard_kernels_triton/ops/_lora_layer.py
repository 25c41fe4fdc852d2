"""The inputs of an expert layer with adapters, and the matmuls that both passes share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tokenyard.experts import LoraCall, LoraPair
from tokenyard_kernels_triton.ops._alignment import contiguous
from tokenyard_kernels_triton.ops._experts_call import aligned_call
from tokenyard_kernels_triton.ops._kernel_set import (
    KernelSet,
    KernelSetName,
    fitting_set,
    kernel_set,
)
from tokenyard_kernels_triton.ops._low_rank import (
    WideOperand,
    add_low_rank_and_activate,
    to_low_rank,
    tokens_as_rows,
)
from tokenyard_kernels_triton.ops._row_tiles import RowTiles


@dataclass
class LoraLayer:
    """A call with what both passes compute from it."""

    call: LoraCall
    row_tiles: RowTiles
    matmuls: KernelSet[Any]

    def rows_of(self, tokens: Tensor) -> Any:
        """Return the rows of tokens [T, D] as an operand of a matmul with a frozen weight."""
        return self.matmuls.rows_of(tokens, self.call.plan, self.call.weights.down.shape[2])

    def up_input(self) -> WideOperand:
        """Return the operand of A of up."""
        call = self.call
        return tokens_as_rows(call.x if call.dropped is None else call.dropped, call.plan)

    def down_input(self, a: Tensor) -> WideOperand:
        """Return the operand of A of down, for activations a [R, F]."""
        return WideOperand(a, self.call.plan.order, mask=self.call.mask)

    def low(self, pair: LoraPair, wide: WideOperand) -> Tensor:
        """Return s A x [R, r]."""
        return to_low_rank(wide, pair.a, pair.scale, self.row_tiles, transposed=False)

    def low_gradient(self, pair: LoraPair, wide: WideOperand) -> Tensor:
        """Return s B^T dy [R, r]."""
        return to_low_rank(wide, pair.b, pair.scale, self.row_tiles, transposed=True)

    def activated(
        self, low: Tensor, keep_z: bool = True, keep_a: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Return z [R, 2F or F] and a [R, F], given s A x [R, r] of the up projection."""
        x, _, _, (up, _, bias, _), pair, *_, activation = self.call
        rows = self.rows_of(x)
        if pair is None:
            return self.matmuls.up_and_activate(
                rows, up, bias, self.row_tiles, activation, keep_z, keep_a
            )
        # Without a fused activation, this matmul has the shape of the activation's gradient.
        z = self.matmuls.times_weight(rows, up, bias, self.row_tiles, True, "activation_gradient")
        a = add_low_rank_and_activate(z, low, pair.b, self.row_tiles, activation, keep_a)
        return z, a


def lora_layer(call: LoraCall, kernels: KernelSetName) -> LoraLayer:
    """Return the layer of a call, with tensors that the kernels can read."""
    call = aligned_call(call)._replace(
        up=_contiguous_pair(call.up),
        down=_contiguous_pair(call.down),
        dropped=contiguous(call.dropped),
        mask=contiguous(call.mask),
    )
    row_tiles = RowTiles(call.plan.offsets, call.plan.order.shape[0])
    kernels = fitting_set(kernels, call.plan, call.x.dtype)
    return LoraLayer(call, row_tiles, kernel_set(kernels))


def _contiguous_pair(pair: LoraPair | None) -> LoraPair | None:
    return None if pair is None else pair._replace(a=pair.a.contiguous(), b=pair.b.contiguous())
