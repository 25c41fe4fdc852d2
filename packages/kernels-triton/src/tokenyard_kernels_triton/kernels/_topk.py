"""The top-k router after its logits: scores, selection by groups and bias, weights; and the gradient of the weights."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _scores(logits, inside, SIGMOID: tl.constexpr):
    if SIGMOID:
        return 1.0 / (1.0 + tl.exp(-logits))
    shifted = tl.exp(logits - tl.max(logits, 1)[:, None])
    shifted = tl.where(inside[None, :], shifted, 0.0)
    return shifted / tl.sum(shifted, 1)[:, None]


@triton.jit
def _take_best(values, column, WIDTH: tl.constexpr):
    """Return the highest value's column, the lowest of equals [T], by way of the maximum."""
    best = tl.max(values, 1)
    return tl.min(tl.where(values == best[:, None], column[None, :], WIDTH), 1)


@triton.jit
def _keep_groups(
    values,
    column,
    group_size,
    num_groups,
    groups_kept,
    TOP_TWO: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Set the values of all but the best groups to -inf."""
    worth = values
    for g in range(num_groups):
        member = (column // group_size == g)[None, :]
        own = tl.where(member, values, float("-inf"))
        score = tl.max(own, 1)
        if TOP_TWO:
            first = _take_best(own, column, WIDTH)
            score += tl.max(tl.where(column[None, :] == first[:, None], float("-inf"), own), 1)
        worth = tl.where(member, score[:, None], worth)
    allowed = tl.zeros_like(values) > 0.0
    for _ in range(groups_kept):
        group = _take_best(tl.where(allowed, float("-inf"), worth), column, WIDTH) // group_size
        allowed = allowed | (column[None, :] // group_size == group[:, None])
    return tl.where(allowed, values, float("-inf"))


@triton.jit(do_not_specialize=["tokens"])
def select_experts(
    logits,
    bias,
    ids,
    tokens,
    num_experts,
    top_k,
    group_size,
    num_groups,
    groups_kept,
    SIGMOID: tl.constexpr,
    SELECT_FIRST: tl.constexpr,
    BIAS: tl.constexpr,
    GROUPS: tl.constexpr,
    TOP_TWO: tl.constexpr,
    TOKENS: tl.constexpr,
    EXPERTS: tl.constexpr,
):
    """Write ids [T, K] of the highest scores of logits [T, E], best first, equal ones lowest id first."""
    token = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    e = tl.arange(0, EXPERTS)
    inside = e < num_experts
    mask = (token < tokens)[:, None] & inside[None, :]
    values = tl.load(
        logits + token[:, None] * num_experts + e[None, :], mask=mask, other=float("-inf")
    )
    if not SELECT_FIRST:
        values = tl.where(
            (token < tokens)[:, None], values, 0.0
        )  # or -inf - -inf is NaN, and warns
        values = tl.where(mask, _scores(values, inside, SIGMOID), float("-inf"))
    if BIAS:
        values += tl.load(bias + e, mask=inside, other=0.0)[None, :]
    if GROUPS:
        values = _keep_groups(
            values,
            e,
            group_size,
            num_groups,
            groups_kept,
            TOP_TWO,
            EXPERTS,
        )
    for k in range(top_k):
        best = _take_best(values, e, EXPERTS)
        tl.store(ids + token * top_k + k, best, mask=token < tokens)
        values = tl.where(e[None, :] == best[:, None], float("-inf"), values)


@triton.jit
def _chosen(
    logits,
    ids,
    token,
    tokens,
    num_experts,
    top_k,
    SIGMOID: tl.constexpr,
    SELECT_FIRST: tl.constexpr,
    TOP_K: tl.constexpr,
    EXPERTS: tl.constexpr,
):
    """Return (scores of the chosen experts, ids, whether kept [T, K]; all scores [T, E])."""
    e, k = tl.arange(0, EXPERTS), tl.arange(0, TOP_K)
    inside = e < num_experts
    mask = (token < tokens)[:, None] & inside[None, :]
    values = tl.load(
        logits + token[:, None] * num_experts + e[None, :], mask=mask, other=float("-inf")
    )
    values = tl.where((token < tokens)[:, None], values, 0.0)
    there = (token < tokens)[:, None] & (k < top_k)[None, :]
    chosen = tl.load(ids + token[:, None] * top_k + k[None, :], mask=there, other=0).to(tl.int32)
    kept = there & (chosen < num_experts)
    own = tl.load(logits + token[:, None] * num_experts + chosen, mask=kept, other=float("-inf"))
    if SELECT_FIRST:
        highest = tl.max(own, 1)[:, None]
        shifted = tl.where(
            kept, tl.exp(own - tl.where(highest == float("-inf"), 0.0, highest)), 0.0
        )
        total = tl.sum(shifted, 1)[:, None]
        return shifted / tl.where(total == 0.0, 1.0, total), chosen, kept, values
    elif SIGMOID:
        return tl.where(kept, 1.0 / (1.0 + tl.exp(-own)), 0.0), chosen, kept, values
    else:
        highest = tl.max(values, 1)[:, None]
        total = tl.sum(tl.where(inside[None, :], tl.exp(values - highest), 0.0), 1)[:, None]
        scores = tl.where(inside[None, :], tl.exp(values - highest) / total, 0.0)
        return tl.where(kept, tl.exp(own - highest) / total, 0.0), chosen, kept, scores


@triton.jit
def _norm(scores, power, POWER: tl.constexpr):
    """Return the p-norm [T, 1] of non-negative scores. The highest is taken out first: powers may underflow."""
    if POWER == 1:
        norm = tl.sum(scores, 1)
    else:
        highest = tl.max(scores, 1)
        highest = tl.where(highest > 0.0, highest, 1.0)
        scores = scores / highest[:, None]
        if POWER == 2:
            norm = highest * tl.sqrt(tl.sum(scores * scores, 1))
        else:
            powers = tl.where(
                scores > 0.0, tl.exp(power * tl.log(tl.where(scores > 0.0, scores, 1.0))), 0.0
            )
            total = tl.sum(powers, 1)
            norm = tl.where(
                total > 0.0,
                highest * tl.exp(tl.log(tl.where(total > 0.0, total, 1.0)) / power),
                0.0,
            )
    return tl.maximum(norm, 1.1754943508222875e-38)[:, None]


@triton.jit(do_not_specialize=["tokens"])
def weigh_experts(
    logits,
    ids,
    weights,
    tokens,
    num_experts,
    top_k,
    power,
    scale,
    SIGMOID: tl.constexpr,
    SELECT_FIRST: tl.constexpr,
    POWER: tl.constexpr,
    NORMALIZE: tl.constexpr,
    TOKENS: tl.constexpr,
    TOP_K: tl.constexpr,
    EXPERTS: tl.constexpr,
):
    """Write weights [T, K] of the chosen ids; a dropped one weighs 0."""
    token = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    k = tl.arange(0, TOP_K)
    scores, _, _, _ = _chosen(
        logits,
        ids,
        token,
        tokens,
        num_experts,
        top_k,
        SIGMOID,
        SELECT_FIRST,
        TOP_K,
        EXPERTS,
    )
    if NORMALIZE:
        scores = scores / _norm(scores, power, POWER)
    there = (token < tokens)[:, None] & (k < top_k)[None, :]
    tl.store(weights + token[:, None] * top_k + k[None, :], scores * scale, mask=there)


@triton.jit(do_not_specialize=["tokens"])
def weigh_experts_backward(
    dweights,
    logits,
    ids,
    dlogits,
    tokens,
    num_experts,
    top_k,
    power,
    scale,
    SIGMOID: tl.constexpr,
    SELECT_FIRST: tl.constexpr,
    POWER: tl.constexpr,
    NORMALIZE: tl.constexpr,
    TOKENS: tl.constexpr,
    TOP_K: tl.constexpr,
    EXPERTS: tl.constexpr,
):
    """Write dlogits [T, E] from dweights [T, K]."""
    token = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    e, k = tl.arange(0, EXPERTS), tl.arange(0, TOP_K)
    own, chosen, kept, scores = _chosen(
        logits,
        ids,
        token,
        tokens,
        num_experts,
        top_k,
        SIGMOID,
        SELECT_FIRST,
        TOP_K,
        EXPERTS,
    )
    there = (token < tokens)[:, None] & (k < top_k)[None, :]
    given = tl.load(dweights + token[:, None] * top_k + k[None, :], mask=there, other=0.0) * scale
    if NORMALIZE:
        norm = _norm(own, power, POWER)
        share = own / norm
        along = tl.sum(given * share, 1)[:, None]
        if POWER == 1:
            direction = tl.full([TOKENS, TOP_K], 1.0, tl.float32)
        elif POWER == 2:
            direction = share
        else:
            direction = tl.exp((power - 1.0) * tl.log(tl.where(share > 0.0, share, 1.0)))
        given = (given - along * direction) / norm
    given = tl.where(kept, given, 0.0)
    mean = tl.sum(given * own, 1)[:, None]
    if SELECT_FIRST:
        given = own * (given - mean)
    elif SIGMOID:
        given = given * own * (1.0 - own)
    spread = tl.zeros([TOKENS, EXPERTS], tl.float32)
    for j in range(top_k):
        at = (k == j)[None, :]
        expert = tl.sum(tl.where(at & kept, chosen, 0), 1)
        value = tl.sum(tl.where(at, given, 0.0), 1)
        spread += tl.where(e[None, :] == expert[:, None], value[:, None], 0.0)
    if not SIGMOID and not SELECT_FIRST:
        spread = scores * (spread - mean)
    mask = (token < tokens)[:, None] & (e < num_experts)[None, :]
    tl.store(dlogits + token[:, None] * num_experts + e[None, :], spread, mask=mask)
