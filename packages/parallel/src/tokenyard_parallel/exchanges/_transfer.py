"""One all-to-all of rows between ranks, and the reverse one for their gradients.

A transfer is two autograd nodes, and other work can run between them. In the forward pass `begin`
starts the collective and `end` waits for it. In the backward pass `end` starts it and `begin`
waits, so the same work overlaps with it again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from tokenyard import TokenyardError
from tokenyard_parallel._torch_private import begin_all_to_all, end_all_to_all


class ExchangeError(TokenyardError):
    """Ranks disagree on what they exchange, or the exchange has no process group."""


Direction = Literal["forward", "backward"]


class Transfer:
    """One all-to-all: `sent[r]` rows go to rank r, `received[r]` rows come from it.

    A subclass may send something else than the rows: it overrides `start` and `finish`.
    """

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

    def start(self, direction: Direction, rows: Tensor) -> Tensor:
        """Start to send rows, or in the backward pass gradients; return what `finish` takes."""
        forward = direction == "forward"
        sent = self.sent if forward else self.received
        received = self.received if forward else self.sent
        arriving: Tensor = begin_all_to_all(rows, sent, received, self.group)
        return arriving

    def finish(self, direction: Direction, arriving: Tensor) -> Tensor:
        """Return the rows or gradients that have arrived. Autograd does not see this."""
        rows: Tensor = end_all_to_all(arriving)
        return rows


class _Begin(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, transfer: Transfer) -> Tensor:
        ctx.transfer = transfer
        return transfer.start("forward", rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None]:
        transfer = ctx.transfer
        gradient = transfer.finish("backward", transfer.gradient)
        transfer.gradient = None
        return gradient, None


class _End(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, arriving: Tensor, transfer: Transfer) -> Tensor:
        ctx.transfer = transfer
        ctx.arriving = (arriving.shape, arriving.dtype)
        rows = transfer.finish("forward", arriving)
        return rows.view_as(rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        transfer = ctx.transfer
        transfer.gradient = transfer.start("backward", grad)
        # autograd requires this shape here; `_Begin.backward` returns the real gradient
        shape, dtype = ctx.arriving
        alike = grad.shape == shape and grad.dtype == dtype
        return grad if alike else grad.new_zeros((), dtype=dtype).expand(shape), None
