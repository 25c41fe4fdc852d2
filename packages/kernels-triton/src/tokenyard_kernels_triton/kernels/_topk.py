"""The top-k router after its logits: scores, selection by groups and bias, weights, gradients."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _scores(logits, inside, SIGMOID: tl.constexpr):
    """Return the scores of logits [TOKENS, EXPERTS]: a sigmoid, or a softmax over the experts."""
    if SIGMOID:
        return 1.0 / (1.0 + tl.exp(-logits))
    shifted = tl.exp(logits - tl.max(logits, 1)[:, None])
    shifted = tl.where(inside[None, :], shifted, 0.0)
    return shifted / tl.sum(shifted, 1)[:, None]


@triton.jit
def _take_best(values, column, WIDTH: tl.constexpr):
    """Return the column of each row's highest value [TOKENS], and of equal values the lowest."""
    best = tl.max(values, 1)
    return tl.min(tl.where(values == best[:, None], column[None, :], WIDTH), 1)


@triton.jit
def _keep_groups(
    values,  # [TOKENS, WIDTH]
    column,  # [WIDTH]
    group_size,
    num_groups,
    groups_kept,
    TOP_TWO: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Return the values, with -inf for all but the best groups.

    A group's score is its highest value, or with TOP_TWO the sum of its two highest.
    """
    # Write each group's score into all of its columns.
    group_scores = values
    for g in range(num_groups):
        member = (column // group_size == g)[None, :]
        members = tl.where(member, values, float("-inf"))
        score = tl.max(members, 1)
        if TOP_TWO:
            first = _take_best(members, column, WIDTH)
            second = tl.where(column[None, :] == first[:, None], float("-inf"), members)
            score += tl.max(second, 1)
        group_scores = tl.where(member, score[:, None], group_scores)

    # Take the best group that is not taken yet, `groups_kept` times.
    allowed = tl.zeros_like(values) > 0.0
    for _ in range(groups_kept):
        candidates = tl.where(allowed, float("-inf"), group_scores)
        group = _take_best(candidates, column, WIDTH) // group_size  # [TOKENS]
        allowed = allowed | (column[None, :] // group_size == group[:, None])
    return tl.where(allowed, values, float("-inf"))


@triton.jit(do_not_specialize=["tokens"])
def select_experts(
    logits,  # [T, E]
    bias,  # [E], read if BIAS
    ids,  # [T, K]
    tokens,  # T
    num_experts,  # E
    top_k,  # K
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
    """Write the ids of each token's highest scores, best first; equal scores, lowest id first."""
    token = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    e = tl.arange(0, EXPERTS)
    inside = e < num_experts
    mask = (token < tokens)[:, None] & inside[None, :]
    pointers = logits + token[:, None] * num_experts + e[None, :]
    values = tl.load(pointers, mask=mask, other=float("-inf"))  # [TOKENS, EXPERTS]

    # Scores, unless the logits themselves rank the experts.
    if not SELECT_FIRST:
        # Tokens past the end get 0, since -inf - -inf is nan and warns.
        values = tl.where((token < tokens)[:, None], values, 0.0)
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

    # Take the best expert that is not taken yet, K times.
    for k in range(top_k):
        best = _take_best(values, e, EXPERTS)  # [TOKENS]
        tl.store(ids + token * top_k + k, best, mask=token < tokens)
        values = tl.where(e[None, :] == best[:, None], float("-inf"), values)


@triton.jit
def _topk_scores(
    logits,  # [T, E]
    ids,  # [T, K]
    token,  # [TOKENS]
    tokens,  # T
    num_experts,  # E
    top_k,  # K
    SIGMOID: tl.constexpr,
    SELECT_FIRST: tl.constexpr,
    TOP_K: tl.constexpr,
    EXPERTS: tl.constexpr,
):
    """Return (scores, ids, which slots are kept, all scores) of the selected experts.

    The first three are [TOKENS, TOP_K], the last [TOKENS, EXPERTS].
    """
    # All logits of the tokens.
    e = tl.arange(0, EXPERTS)
    k = tl.arange(0, TOP_K)
    inside = e < num_experts
    mask = (token < tokens)[:, None] & inside[None, :]
    pointers = logits + token[:, None] * num_experts + e[None, :]
    values = tl.load(pointers, mask=mask, other=float("-inf"))
    values = tl.where((token < tokens)[:, None], values, 0.0)

    # The logits of the selected experts; ids from E on are dropped.
    exists = (token < tokens)[:, None] & (k < top_k)[None, :]
    pointers = ids + token[:, None] * top_k + k[None, :]
    expert = tl.load(pointers, mask=exists, other=0).to(tl.int32)
    kept = exists & (expert < num_experts)
    pointers = logits + token[:, None] * num_experts + expert
    selected = tl.load(pointers, mask=kept, other=float("-inf"))

    # Scores: a softmax over the selected experts, a sigmoid, or a softmax over all.
    if SELECT_FIRST:
        highest = tl.max(selected, 1)[:, None]
        shift = tl.where(highest == float("-inf"), 0.0, highest)  # if all slots are dropped
        shifted = tl.where(kept, tl.exp(selected - shift), 0.0)
        total = tl.sum(shifted, 1)[:, None]
        return shifted / tl.where(total == 0.0, 1.0, total), expert, kept, values
    elif SIGMOID:
        return tl.where(kept, 1.0 / (1.0 + tl.exp(-selected)), 0.0), expert, kept, values
    else:
        highest = tl.max(values, 1)[:, None]
        total = tl.sum(tl.where(inside[None, :], tl.exp(values - highest), 0.0), 1)[:, None]
        scores = tl.where(inside[None, :], tl.exp(values - highest) / total, 0.0)
        return tl.where(kept, tl.exp(selected - highest) / total, 0.0), expert, kept, scores


@triton.jit
def _norm(scores, power, POWER: tl.constexpr):
    """Return the p-norm [TOKENS, 1] of non-negative scores; POWER is 1, 2, or 0 for any power.

    The highest score is factored out first, because powers may underflow.
    """
    if POWER == 1:
        norm = tl.sum(scores, 1)
    else:
        highest = tl.max(scores, 1)
        highest = tl.where(highest > 0.0, highest, 1.0)
        scores = scores / highest[:, None]
        if POWER == 2:
            norm = highest * tl.sqrt(tl.sum(scores * scores, 1))
        else:
            logs = tl.log(tl.where(scores > 0.0, scores, 1.0))
            powers = tl.where(scores > 0.0, tl.exp(power * logs), 0.0)
            total = tl.sum(powers, 1)
            root = tl.exp(tl.log(tl.where(total > 0.0, total, 1.0)) / power)
            norm = tl.where(total > 0.0, highest * root, 0.0)
    return tl.maximum(norm, 1.1754943508222875e-38)[:, None]  # the least normal float32


@triton.jit(do_not_specialize=["tokens"])
def weigh_experts(
    logits,  # [T, E]
    ids,  # [T, K]
    weights,  # [T, K]
    tokens,  # T
    num_experts,  # E
    top_k,  # K
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
    """Write the weights of the selected experts; 0 for a dropped slot."""
    token = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    k = tl.arange(0, TOP_K)
    scores, _, _, _ = _topk_scores(
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
    exists = (token < tokens)[:, None] & (k < top_k)[None, :]
    tl.store(weights + token[:, None] * top_k + k[None, :], scores * scale, mask=exists)


@triton.jit(do_not_specialize=["tokens"])
def weigh_experts_backward(
    dweights,  # [T, K]
    logits,  # [T, E]
    ids,  # [T, K]
    dlogits,  # [T, E]
    tokens,  # T
    num_experts,  # E
    top_k,  # K
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
    """Write the gradient of the logits."""
    token = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    e = tl.arange(0, EXPERTS)
    k = tl.arange(0, TOP_K)
    selected, expert, kept, scores = _topk_scores(
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
    exists = (token < tokens)[:, None] & (k < top_k)[None, :]
    pointers = dweights + token[:, None] * top_k + k[None, :]
    gradient = tl.load(pointers, mask=exists, other=0.0) * scale  # [TOKENS, TOP_K]

    # Through the normalization: remove the part along the norm's gradient.
    if NORMALIZE:
        norm = _norm(selected, power, POWER)
        share = selected / norm
        along = tl.sum(gradient * share, 1)[:, None]
        if POWER == 1:
            direction = tl.full([TOKENS, TOP_K], 1.0, tl.float32)
        elif POWER == 2:
            direction = share
        else:
            direction = tl.exp((power - 1.0) * tl.log(tl.where(share > 0.0, share, 1.0)))
        gradient = (gradient - along * direction) / norm
    gradient = tl.where(kept, gradient, 0.0)

    # Through the softmax over the selected experts, or the sigmoid.
    mean = tl.sum(gradient * selected, 1)[:, None]
    if SELECT_FIRST:
        gradient = selected * (gradient - mean)
    elif SIGMOID:
        gradient = gradient * selected * (1.0 - selected)

    # Scatter the slots' gradients to their experts: [TOKENS, EXPERTS].
    spread = tl.zeros([TOKENS, EXPERTS], tl.float32)
    for j in range(top_k):
        at = (k == j)[None, :]
        target = tl.sum(tl.where(at & kept, expert, 0), 1)
        value = tl.sum(tl.where(at, gradient, 0.0), 1)
        spread += tl.where(e[None, :] == target[:, None], value[:, None], 0.0)

    # Through the softmax over all experts.
    if not SIGMOID and not SELECT_FIRST:
        spread = scores * (spread - mean)
    mask = (token < tokens)[:, None] & (e < num_experts)[None, :]
    tl.store(dlogits + token[:, None] * num_experts + e[None, :], spread, mask=mask)
