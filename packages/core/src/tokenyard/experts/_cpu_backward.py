"""The backward pass of the `cpu` kernel, one expert after another."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tokenyard.activations import activate_with_pullback
from tokenyard.experts._cpu_rows import PaddedRows, new_rows, pad_rows, sum_by_token, weighted
from tokenyard.experts._op import ExpertGradients, ExpertNeeds, ExpertsCall
from tokenyard.interfaces import logits_dtype


def cpu_backward(
    dy: Tensor, call: ExpertsCall, saved: list[Tensor], needs: ExpertNeeds
) -> ExpertGradients:
    """Return the gradients that are needed; `saved` holds the pre-activation z."""
    padded = pad_rows(call.plan, call.topk_weights, call.x.dtype)
    grads = _new_gradients(call, padded, needs)
    backward = _Backward(call, dy, saved[0], padded, grads)
    for e, start, end in padded.segments:
        backward.expert(e, start, end)
    for e in (call.plan.offsets.diff() == 0).nonzero().flatten().tolist():
        for name in grads.keys() & {"up", "down", "up_bias", "down_bias"}:
            grads[name][e] = 0
    if "x" in grads:
        grads["x"] = sum_by_token(grads["x"], padded)
    if "topk_weights" in grads:
        grads["topk_weights"] = grads["topk_weights"][:, 0][padded.slots]
    return ExpertGradients(**grads)


def _new_gradients(call: ExpertsCall, padded: PaddedRows, needs: ExpertNeeds) -> dict[str, Tensor]:
    """Return uninitialised gradients by name; those of x and topk_weights have padded rows."""
    x = call.x
    up = call.weights.up
    down = call.weights.down
    factories = {
        "x": lambda: new_rows(padded, x.shape[1], x.dtype),
        "topk_weights": lambda: new_rows(padded, 1, logits_dtype(x.dtype)),
        "up": lambda: up.new_empty(up.shape),
        "down": lambda: down.new_empty(down.shape),
        "up_bias": lambda: up.new_empty(up.shape[:2]),
        "down_bias": lambda: down.new_empty(down.shape[:2]),
    }
    return {name: factories[name]() for name, need in needs._asdict().items() if need}


@dataclass(frozen=True)
class _Backward:
    """The gradients of one call, written expert by expert; n rows for each expert."""

    call: ExpertsCall
    dy: Tensor  # [T, D]
    z: Tensor  # [max_rows, 2F or F]
    padded: PaddedRows
    grads: dict[str, Tensor]

    def expert(self, e: int, start: int, end: int) -> None:
        """Write the gradients of expert e, whose rows are start:end."""
        weights = self.padded.weights[start:end]  # [n, 1]
        drows = self.dy.index_select(0, self.padded.tokens[start:end])  # [n, D]
        act, pullback = activate_with_pullback(self.z[start:end], self.call.activation)  # [n, F]
        self._down(e, drows, act, weights)
        if self.grads.keys() & {"x", "topk_weights", "up", "up_bias"}:
            da = torch.mm(drows, self.call.weights.down[e])  # [n, F]
            self._topk_weights(e, start, drows, act, da)
            self._up(e, start, pullback(weighted(da, weights)))

    def _down(self, e: int, drows: Tensor, act: Tensor, weights: Tensor) -> None:
        """Write the gradients of expert e's down projection and its bias."""
        if "down" in self.grads:
            torch.mm(drows.T, weighted(act, weights), out=self.grads["down"][e])
        if "down_bias" in self.grads:
            self.grads["down_bias"][e] = _sum(weighted(drows, weights))

    def _topk_weights(self, e: int, start: int, drows: Tensor, act: Tensor, da: Tensor) -> None:
        """Write the gradients of the weights of expert e's rows."""
        if "topk_weights" not in self.grads:
            return
        dots = _dots(da, act)  # [n, 1]
        if self.call.weights.down_bias is not None:
            dots = dots + _dots(drows, self.call.weights.down_bias[e])
        self.grads["topk_weights"][start : start + len(drows)] = dots

    def _up(self, e: int, start: int, dz: Tensor) -> None:
        """Write the gradients of expert e's up projection, its bias, and x."""
        end = start + dz.shape[0]
        if "up" in self.grads:
            x = self.call.x.index_select(0, self.padded.tokens[start:end])  # [n, D]
            torch.mm(dz.T, x, out=self.grads["up"][e])
        if "up_bias" in self.grads:
            self.grads["up_bias"][e] = _sum(dz)
        if "x" in self.grads:
            torch.mm(dz, self.call.weights.up[e], out=self.grads["x"][start:end])


def _dots(left: Tensor, right: Tensor) -> Tensor:
    """Return [n, 1]: the dot product of each row of left and right, in float32 at least."""
    return (left.to(logits_dtype(left.dtype)) * right).sum(1, keepdim=True)


def _sum(rows: Tensor) -> Tensor:
    return rows.sum(0, dtype=logits_dtype(rows.dtype))
