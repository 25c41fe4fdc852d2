"""The base of routers that select experts for a whole batch at once."""

from __future__ import annotations

from torch import Tensor

from tokenyard.interfaces import Routing
from tokenyard.routers._topk import TopKRouter


class BatchRouter(TopKRouter):
    """A top-k router in which the selection for a token depends on the other tokens of the batch.

    `forward` has no argument `padding`, so packed documents are refused: padding would compete with
    the tokens.
    """

    def forward(  # type: ignore[override]
        self, x: Tensor, topk_ids: Tensor | None = None
    ) -> Routing:
        """Route x [T, D]. topk_ids [T, K] override the selection."""
        return super().forward(x, topk_ids)
