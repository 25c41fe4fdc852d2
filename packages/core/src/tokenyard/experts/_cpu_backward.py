"""The gradients of the `cpu` kernel, one expert after another."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tokenyard.activations import activate_with_pullback
from tokenyard.experts._cpu_rows import Layout, lay_out, rows_to_fill, sum_by_token, weighted
from tokenyard.experts._op import ExpertGradients, ExpertNeeds, ExpertsCall
from tokenyard.interfaces import logits_dtype


def cpu_backward(
    dy: Tensor, call: ExpertsCall, saved: list[Tensor], needs: ExpertNeeds
) -> ExpertGradients:
    """Return the gradients that are needed; `saved` is the pre-activation z."""
    x, plan, topk_weights, (up, down, _, down_bias), activation = call
    layout = lay_out(plan, topk_weights, x.dtype)
    grads = _unwritten(x, layout, up, down, needs)
    backward = _Backward(dy, x, saved[0], layout, up, down, down_bias, activation, grads)
    for e, a, b in layout.segments:
        backward.expert(e, a, b)
    for e in (plan.offsets.diff() == 0).nonzero().flatten().tolist():
        for name in grads.keys() & {"up", "down", "up_bias", "down_bias"}:
            grads[name][e] = 0
    if "x" in grads:
        grads["x"] = sum_by_token(grads["x"], layout)
    if "topk_weights" in grads:
        grads["topk_weights"] = grads["topk_weights"][:, 0][layout.slots]
    return ExpertGradients(**grads)


def _unwritten(
    x: Tensor, layout: Layout, up: Tensor, down: Tensor, needs: ExpertNeeds
) -> dict[str, Tensor]:
    """Return where the gradients that are needed go: those of x and topk_weights by row."""
    made = {
        "x": lambda: rows_to_fill(layout, x.shape[1], x.dtype),
        "topk_weights": lambda: rows_to_fill(layout, 1, logits_dtype(x.dtype)),
        "up": lambda: up.new_empty(up.shape),
        "down": lambda: down.new_empty(down.shape),
        "up_bias": lambda: up.new_empty(up.shape[:2]),
        "down_bias": lambda: down.new_empty(down.shape[:2]),
    }
    return {name: made[name]() for name, need in needs._asdict().items() if need}


@dataclass(frozen=True)
class _Backward:
    dy: Tensor
    x: Tensor
    z: Tensor
    layout: Layout
    up: Tensor
    down: Tensor
    down_bias: Tensor | None
    activation: str
    grads: dict[str, Tensor]

    def expert(self, e: int, a: int, b: int) -> None:
        """Write what the rows a to b, which are expert e's, contribute."""
        weights = self.layout.weights[a:b]
        drows = self.dy.index_select(0, self.layout.tokens[a:b])
        act, pullback = activate_with_pullback(self.z[a:b], self.activation)
        self._down(e, drows, act, weights)
        if self.grads.keys() & {"x", "topk_weights", "up", "up_bias"}:
            da = torch.mm(drows, self.down[e])
            self._gate(e, a, drows, act, da)
            self._up(e, a, pullback(weighted(da, weights)))

    def _down(self, e: int, drows: Tensor, act: Tensor, weights: Tensor) -> None:
        if "down" in self.grads:
            torch.mm(drows.T, weighted(act, weights), out=self.grads["down"][e])
        if "down_bias" in self.grads:
            self.grads["down_bias"][e] = _sum(weighted(drows, weights))

    def _gate(self, e: int, a: int, drows: Tensor, act: Tensor, da: Tensor) -> None:
        if "topk_weights" not in self.grads:
            return
        dots = (
            _dots(da, act)
            if self.down_bias is None
            else _dots(da, act) + _dots(drows, self.down_bias[e])
        )
        self.grads["topk_weights"][a : a + len(drows)] = dots

    def _up(self, e: int, a: int, dz: Tensor) -> None:
        b = a + dz.shape[0]
        if "up" in self.grads:
            torch.mm(dz.T, self.x.index_select(0, self.layout.tokens[a:b]), out=self.grads["up"][e])
        if "up_bias" in self.grads:
            self.grads["up_bias"][e] = _sum(dz)
        if "x" in self.grads:
            torch.mm(dz, self.up[e], out=self.grads["x"][a:b])


def _dots(left: Tensor, right: Tensor) -> Tensor:
    """Return [n, 1]: the dot product of each row of left with right's, in float32 at least."""
    return (left.to(logits_dtype(left.dtype)) * right).sum(1, keepdim=True)


def _sum(rows: Tensor) -> Tensor:
    return rows.sum(0, dtype=logits_dtype(rows.dtype))
