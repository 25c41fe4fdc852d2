"""One all-to-all of rows between ranks, and the reverse one for their gradients.

A transfer is two autograd nodes, and other work can run between them. In the forward pass `begin`
starts the collective and `end` waits for it. In the backward pass `end` starts it and `begin`
waits, so the same work overlaps with it again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tokenyard import TokenyardError


class ExchangeError(TokenyardError):
    """Ranks disagree on what they exchange, or the exchange has no process group."""


class Transfer:
    """One all-to-all: `sent[r]` rows go to rank r, `received[r]` rows come from it."""

    def __init__(self, group: Any, sent: Sequence[int], received: Sequence[int]):
        self.group = group
        self.sent = list(sent)
        self.received = list(received)
        self.work: Any = None  # the collective in flight
        self.gradient: Tensor | None = None  # its result in the backward pass

    def begin(self, rows: Tensor) -> Tensor:
        """Start to send rows [sum(sent), ...]; return a tensor that only `end` may read."""
        out: Tensor = _Begin.apply(rows, self)
        return out

    def end(self, rows: Tensor) -> Tensor:
        """Return the received rows [sum(received), ...]; `rows` is the result of `begin`."""
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
        """Wait for the collective in flight: on a GPU the stream waits, and the host does not."""
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
        gradient = transfer.gradient
        transfer.gradient = None
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
        # autograd requires this shape here; `_Begin.backward` returns the real gradient
        return grad, None
