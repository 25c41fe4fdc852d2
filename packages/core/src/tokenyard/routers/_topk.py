"""The top-k router, with every option of RoutingRule."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tokenyard.dtypes import compute_dtype
from tokenyard.interfaces import Balance, Routing, logits_dtype
from tokenyard.reset import reset
from tokenyard.routers._selection import chosen_experts, drop_over_capacity, select
from tokenyard.workload import Workload


class TopKRouter(nn.Module):
    """Computes logits with one weight matrix, and selects K experts by ``workload.router``.

    The logits are a matmul of operands rounded to the compute dtype, accumulated in float32
    (float64 for float64). This also holds under autocast, so mixed precision by autocast and by
    FSDP give the same routing.
    """

    selection_bias: Tensor | None

    def __init__(self, workload: Workload):
        super().__init__()
        self.rule = workload.router
        self.num_experts = workload.num_experts
        self.top_k = workload.top_k
        self.weight = nn.Parameter(torch.empty(self.num_experts, workload.dim))
        bias = torch.zeros(self.num_experts, dtype=torch.float32)
        self.register_buffer("selection_bias", bias if self.rule.bias_update_rate else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weight from U(-b, b) with b = 1/sqrt(D), and zero the selection bias."""
        reset((self.weight,), (self.selection_bias,))

    def forward(
        self, x: Tensor, topk_ids: Tensor | None = None, padding: Tensor | None = None
    ) -> Routing:
        """Route x [T, D]. topk_ids [T, K] override the selection; `padding` [T] is dropped."""
        ids, weights, logits = self.route(self._jitter(x), topk_ids)
        if padding is not None:
            ids = ids.masked_fill(padding.unsqueeze(1), self.num_experts)
            weights = weights.masked_fill(padding.unsqueeze(1), 0)
        if topk_ids is None and self.rule.capacity_factor is not None:
            ids = drop_over_capacity(ids.long(), self.num_experts, self._capacity(x, padding))
        return Routing(ids.int(), weights, logits)

    def route(self, x: Tensor, topk_ids: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return ids [T, K], weights [T, K] and logits [T, E] for x [T, D].

        Ignores the capacity. A faster router overrides this method, or `logits` and `choose`.
        """
        logits = self.logits(x)
        return *self.choose(logits, topk_ids), logits

    def logits(self, x: Tensor) -> Tensor:
        """Return the logits [T, E] of x [T, D]."""
        narrow = compute_dtype(x)
        wide = logits_dtype(narrow)
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.to(narrow).to(wide), self.weight.to(narrow).to(wide))

    def choose(self, logits: Tensor, topk_ids: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return ids [T, K] and weights [T, K] for logits [T, E].

        Ignores the capacity. topk_ids override the selection.
        """
        scores = logits.sigmoid() if self.rule.score == "sigmoid" else logits.softmax(-1)
        ids = self._select(logits, scores) if topk_ids is None else topk_ids.long()
        return ids, self._weigh(logits, scores, ids)

    def balance(self, routing: Routing, padding: Tensor | None = None) -> Balance:
        """Return the Balance of a routing, without `padding` [T].

        Probabilities are the softmax of the logits, or the sigmoid scores divided by their sum.
        """
        chosen = chosen_experts(routing.topk_ids.reshape(-1).long(), self.num_experts)
        counts = torch.zeros(self.num_experts + 1, dtype=torch.int64, device=chosen.device)
        counts = counts.scatter_add(0, chosen, torch.ones_like(chosen))[:-1]
        if self.rule.score == "sigmoid":
            scores = routing.logits.sigmoid()
            probs = scores / scores.sum(-1, keepdim=True)
        else:
            probs = routing.logits.softmax(-1)
        z = routing.logits.logsumexp(-1).square()
        dropped = routing.topk_ids >= self.num_experts
        if padding is not None:
            probs = probs.masked_fill(padding.unsqueeze(1), 0)
            z = z.masked_fill(padding, 0)
            dropped = dropped & ~padding.unsqueeze(1)
        return Balance(counts, dropped.sum(), probs.sum(0), z.sum())

    @torch.no_grad()
    def update(self, counts: Tensor) -> None:
        """Raise the selection bias of experts with fewer slots than the mean, and lower the others.

        Source: arXiv 2408.15664, algorithm 1.
        """
        if self.selection_bias is not None:
            counts = counts.to(self.selection_bias)
            self.selection_bias += self.rule.bias_update_rate * (counts.mean() - counts).sign()

    def _capacity(self, x: Tensor, padding: Tensor | None) -> Tensor | int:
        """Return the most slots of an expert. With padding it is a tensor: no host sync."""
        slots = (self.rule.capacity_factor or 0) * self.top_k
        if padding is None:
            return int(slots * x.shape[0] / self.num_experts)
        return (slots * (~padding).sum().double() / self.num_experts).floor()

    def _jitter(self, x: Tensor) -> Tensor:
        if not (self.training and self.rule.jitter):
            return x
        return x * torch.empty_like(x).uniform_(1 - self.rule.jitter, 1 + self.rule.jitter)

    @torch.no_grad()
    def _select(self, logits: Tensor, scores: Tensor) -> Tensor:
        scores = logits if self.rule.select_first else scores
        if self.selection_bias is not None:
            scores = scores + self.selection_bias
        return select(scores, self.top_k, self.rule)

    def _weigh(self, logits: Tensor, scores: Tensor, ids: Tensor) -> Tensor:
        """Return the weights [T, K] of ids [T, K]; dropped slots weigh 0."""
        kept = ids < self.num_experts
        ids = ids.clamp(max=self.num_experts - 1)
        if self.rule.select_first:
            topk_logits = logits.gather(1, ids).masked_fill(~kept, torch.finfo(logits.dtype).min)
            weights = topk_logits.softmax(-1) * kept
        else:
            weights = scores.gather(1, ids) * kept
        if self.rule.normalize is not None:
            weights = weights / _norm(weights, self.rule.normalize)
        return weights * self.rule.scale if self.rule.scale != 1 else weights


def _norm(weights: Tensor, power: float) -> Tensor:
    """Return the p-norm [T, 1] of weights [T, K], clamped to be positive."""
    tiny = torch.finfo(weights.dtype).tiny
    if power == 1:
        return weights.sum(-1, keepdim=True).clamp_min(tiny)
    # factor out the highest weight, because powers of small weights underflow
    highest = weights.detach().amax(-1, keepdim=True).clamp_min(tiny)
    norm: Tensor = highest * torch.linalg.vector_norm(
        weights / highest, ord=power, dim=-1, keepdim=True
    )
    return norm.clamp_min(tiny)
