"""The gradients of experts with low-rank adapters."""

from __future__ import annotations

from torch import Tensor

from tokenyard.activations import activate_with_pullback
from tokenyard.experts._grouped_matmuls import row_experts, rows_outer, rows_sum, rows_times
from tokenyard.experts._lora_call import LoraCall
from tokenyard.permutations._moves import rows_to_slots, slots_to_rows, to_rows, to_tokens


def backward(
    dy: Tensor, call: LoraCall, saved: list[Tensor], wanted: set[str]
) -> dict[str, Tensor]:
    """Return the gradients of the tensors that `wanted` names."""
    (z,) = saved
    gradients: dict[str, Tensor] = {}
    dz = _through_down(dy, z, call, wanted, gradients)
    _through_up(dz, call, wanted, gradients)
    return gradients


def _through_down(
    dy: Tensor, z: Tensor, call: LoraCall, wanted: set[str], gradients: dict[str, Tensor]
) -> Tensor:
    """Return dz [R, 2F or F]; add the gradients of the down projection and of topk_weights."""
    _, plan, topk_weights, (_, down, _, down_bias), _, pair, *_ = call
    offsets = plan.offsets
    a, pullback = activate_with_pullback(z, call.activation)  # [R, F]
    drows = to_rows(dy.contiguous(), plan)  # [R, D], not multiplied by topk_weights
    row_weights = None if topk_weights is None else slots_to_rows(topk_weights, plan)  # [R, 1]
    da = rows_times(drows, down, offsets)  # [R, F], not multiplied by topk_weights
    if pair is not None:
        dlow = pair.low_gradient(drows)  # [R, rank], not multiplied by topk_weights
        da += call.masked(rows_times(dlow, pair.a, offsets))
        if "down_a" in wanted:
            dlow = _weighted(dlow, row_weights)
            gradients["down_a"] = rows_outer(dlow, call.masked(a), offsets)
        if "down_b" in wanted:
            low = _weighted(pair.low(call.masked(a)), row_weights)
            gradients["down_b"] = rows_outer(drows, low, offsets)
    if "topk_weights" in wanted and topk_weights is not None:
        dots = (da.to(topk_weights.dtype) * a).sum(1, keepdim=True)
        if down_bias is not None:
            biases = down_bias[row_experts(drows, offsets)]
            dots += (drows.to(topk_weights.dtype) * biases).sum(1, keepdim=True)
        gradients["topk_weights"] = rows_to_slots(dots, plan).squeeze(-1)
    if "down" in wanted:
        gradients["down"] = rows_outer(drows, _weighted(a, row_weights), offsets)
    if "down_bias" in wanted:
        gradients["down_bias"] = rows_sum(_weighted(drows, row_weights), offsets)
    return pullback(_weighted(da, row_weights))


def _through_up(dz: Tensor, call: LoraCall, wanted: set[str], gradients: dict[str, Tensor]) -> None:
    """Add the gradients of the up projection, of x, and of x after dropout."""
    x, plan, _, weights, pair, *_ = call
    offsets = plan.offsets
    dx_rows = rows_times(dz, weights.up, offsets) if "x" in wanted else None  # [R, D]
    if pair is not None:
        dlow = pair.low_gradient(dz)  # [R, rank]
        if wanted & {"up_a", "up_b"}:
            a_rows = to_rows(x if call.dropped is None else call.dropped, plan)  # [R, D]
            gradients["up_a"] = rows_outer(dlow, a_rows, offsets)
            gradients["up_b"] = rows_outer(dz, pair.low(a_rows), offsets)
            del a_rows
        if "dropped" in wanted:
            gradients["dropped"] = to_tokens(rows_times(dlow, pair.a, offsets), plan, None)
        elif dx_rows is not None and call.dropped is None:
            dx_rows += rows_times(dlow, pair.a, offsets)
    if dx_rows is not None:
        gradients["x"] = to_tokens(dx_rows, plan, None)
    if "up" in wanted:
        gradients["up"] = rows_outer(dz, to_rows(x, plan), offsets)
    if "up_bias" in wanted:
        gradients["up_bias"] = rows_sum(dz, offsets)


def _weighted(rows: Tensor, weights: Tensor | None) -> Tensor:
    return rows if weights is None else (rows * weights).to(rows.dtype)
