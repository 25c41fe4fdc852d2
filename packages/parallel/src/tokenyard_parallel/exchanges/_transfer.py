"""Rows on their way between ranks, there and, for their gradients, back.

A transfer is two nodes of autograd's graph. Between them other work can be done: forward, the first starts the
collective and the second waits for it; backward it is the other way round, so that what overlapped does so again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tokenyard import TokenyardError


class ExchangeError(TokenyardError):
    """Ranks do not agree on what they exchange."""


class Transfer:
    """One exchange of rows between the ranks of a group: `sent[r]` rows go to rank r, `received[r]` come from it."""

    def __init__(self, group: Any, sent: Sequence[int], received: Sequence[int]):
        self.group, self.sent, self.received = group, list(sent), list(received)
        self.work: Any = None
        self.gradient: Tensor | None = None  # on its way back

    def begin(self, rows: Tensor) -> Tensor:
        """Start sending rows [sum(sent), ...]; what is returned is defined after `end`."""
        out: Tensor = _Begin.apply(rows, self)
        return out

    def end(self, rows: Tensor) -> Tensor:
        """Return the rows [sum(received), ...] that `begin` was for."""
        out: Tensor = _End.apply(rows, self)
        return out

    def begin_all_to_all(self, rows: Tensor, sent: list[int], received: list[int]) -> Tensor:
        """Start one collective."""
        out = rows.new_empty(sum(received), *rows.shape[1:])
        self.work = dist.all_to_all_single(
            out, rows.contiguous(), received, sent, group=self.group, async_op=True
        )
        return out

    def end_all_to_all(self) -> None:
        """Wait for the collective that was started; on a GPU its stream does, and not the host."""
        self.work.wait()
        self.work = None


class _Begin(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, transfer: Transfer) -> Tensor:
        ctx.transfer = transfer
        return transfer.begin_all_to_all(rows, transfer.sent, transfer.received)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None]:
        transfer = ctx.transfer
        transfer.end_all_to_all()
        gradient, transfer.gradient = transfer.gradient, None
        return gradient, None


class _End(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, transfer: Transfer) -> Tensor:
        ctx.transfer = transfer
        transfer.end_all_to_all()
        return rows.view_as(rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        transfer = ctx.transfer
        transfer.gradient = transfer.begin_all_to_all(grad, transfer.received, transfer.sent)
        return (
            grad,
            None,
        )  # of the shape that autograd asks for; the gradient is what `_Begin` waits for
