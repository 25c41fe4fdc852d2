"""One all-to-all of rows between ranks, and the reverse one for their gradients.

A transfer is two autograd nodes, and other work can run between them. In the forward pass `begin`
starts the collective and `end` waits for it. In the backward pass `end` starts it and `begin`
waits, so the same work overlaps with it again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tokenyard import TokenyardError
from tokenyard_parallel._torch_private import begin_all_to_all, end_all_to_all


class ExchangeError(TokenyardError):
    """Ranks disagree on what they exchange, or the exchange has no process group."""


class Transfer:
    """One all-to-all: `sent[r]` rows go to rank r, `received[r]` rows come from it."""

    def __init__(self, group: Any, sent: Sequence[int], received: Sequence[int]):
        self.group = group
        self.sent = list(sent)
        self.received = list(received)
        self.gradient: Tensor | None = None  # what arrives in the backward pass

    def begin(self, rows: Tensor) -> Tensor:
        """Start to send rows [sum(sent), ...]; return a tensor that only `end` may read."""
        out: Tensor = _Begin.apply(rows, self)
        return out

    def end(self, rows: Tensor) -> Tensor:
        """Return the received rows [sum(received), ...]; `rows` is the result of `begin`."""
        out: Tensor = _End.apply(rows, self)
        return out


class _Begin(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, transfer: Transfer) -> Tensor:
        ctx.transfer = transfer
        return begin_all_to_all(rows, transfer.sent, transfer.received, transfer.group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None]:
        transfer = ctx.transfer
        gradient = end_all_to_all(transfer.gradient)
        transfer.gradient = None
        return gradient, None


class _End(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, transfer: Transfer) -> Tensor:
        ctx.transfer = transfer
        return end_all_to_all(rows).view_as(rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        transfer = ctx.transfer
        transfer.gradient = begin_all_to_all(grad, transfer.received, transfer.sent, transfer.group)
        # autograd requires this shape here; `_Begin.backward` returns the real gradient
        return grad, None
