"""The rows of tokens as an operand of a matmul that gathers them, so that they are not copied."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenRows:
    """The rows of tokens, sorted by expert and not copied; with some attributes of a tensor."""

    tokens: Tensor  # [T, D]
    order: Tensor  # [R], of a plan
    top_k: int

    @property
    def shape(self) -> tuple[int, int]:
        """(R, D)."""
        return self.order.shape[0], self.tokens.shape[1]

    @property
    def device(self) -> torch.device:
        """The tokens' device."""
        return self.tokens.device

    def new_empty(self, *shape: int) -> Tensor:
        """Return an undefined tensor of the tokens' dtype and device."""
        return self.tokens.new_empty(shape)


Rows = Tensor | TokenRows
"""A left or right operand [R, D] whose rows are sorted by expert."""


def operand(rows: Rows) -> tuple[Tensor, Tensor | None, int]:
    """Return a kernel's arguments for `rows`: (rows, None, 0) or (tokens, order, top_k)."""
    if isinstance(rows, TokenRows):
        return rows.tokens, rows.order, rows.top_k
    return rows, None, 0
