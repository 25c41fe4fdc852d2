"""The gradients of the `cpu` kernel, one expert after another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tokenyard.activations import activate_with_pullback
from tokenyard.experts._cpu_rows import Layout, lay_out, rows_to_fill, sum_by_token, weighted
from tokenyard.interfaces import Plan, logits_dtype

_NAMES = ("x", "topk_weights", "up", "down", "up_bias", "down_bias")


@torch.library.custom_op("tokenyard::cpu_experts_backward", mutates_args=(), device_types="cpu")
def cpu_experts_backward_op(
    dy: Tensor,
    x: Tensor,
    z: Tensor,
    order: Tensor,
    inverse: Tensor,
    offsets: Tensor,
    topk_weights: Tensor | None,
    up: Tensor,
    down: Tensor,
    down_bias: Tensor | None,
    top_k: int,
    activation: str,
    needs: list[bool],
) -> list[Tensor]:
    """Return the gradients of x, topk_weights, up, down, up_bias and down_bias; an empty one where none is needed."""
    layout = lay_out(Plan(order, inverse, offsets, top_k), topk_weights, x.dtype)
    grads = _unwritten(x, layout, up, down, needs)
    backward = _Backward(dy, x, z, layout, up, down, down_bias, activation, grads)
    for e, a, b in layout.segments:
        backward.expert(e, a, b)
    for e in (offsets.diff() == 0).nonzero().flatten().tolist():
        for name in grads.keys() & {"up", "down", "up_bias", "down_bias"}:
            grads[name][e] = 0
    if "x" in grads:
        grads["x"] = sum_by_token(grads["x"], layout)
    if "topk_weights" in grads:
        grads["topk_weights"] = grads["topk_weights"][:, 0][layout.slots]
    return [grads.get(name, dy.new_empty(0)) for name in _NAMES]


@cpu_experts_backward_op.register_fake
def _(dy: Tensor, x: Tensor, z: Tensor, *rest: Any) -> list[Tensor]:
    _, _, _, topk_weights, up, down, _, _, _, needs = rest
    weights = x if topk_weights is None else topk_weights
    shapes = (x.shape, weights.shape, up.shape, down.shape, up.shape[:2], down.shape[:2])
    likes = (x, weights, up, down, up, down)
    return [like.new_empty(shape if need else 0) for like, shape, need in zip(likes, shapes, needs)]


def _unwritten(x: Tensor, layout: Layout, up: Tensor, down: Tensor, needs: list[bool]) -> dict[str, Tensor]:
    """Return where the gradients that are needed go: those of x and topk_weights by row."""
    made = {
        "x": lambda: rows_to_fill(layout, x.shape[1], x.dtype),
        "topk_weights": lambda: rows_to_fill(layout, 1, logits_dtype(x.dtype)),
        "up": lambda: up.new_empty(up.shape),
        "down": lambda: down.new_empty(down.shape),
        "up_bias": lambda: up.new_empty(up.shape[:2]),
        "down_bias": lambda: down.new_empty(down.shape[:2]),
    }
    return {name: made[name]() for name, need in zip(_NAMES, needs) if need}


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
        dots = _dots(da, act) if self.down_bias is None else _dots(da, act) + _dots(drows, self.down_bias[e])
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
