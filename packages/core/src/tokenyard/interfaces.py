"""What tokenyard's packages pass to each other, and what each of them promises.

Shapes stand as trailing comments: T tokens, K experts per token, N = T*K slots, E experts, D model width, F expert
width, R rows of a plan, B sequences of S tokens, V vocabulary.

    router(x)  -> Routing
    experts(x, routing)
        exchange(x, routing, compute)
            compute: permutation.plan(ids) -> Plan;  kernel(x, plan, topk_weights, weights) -> [T, D]
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn


class Routing(NamedTuple):
    """What the router decided for each token; a pytree, so FSDP2's hooks and Dynamo pass through it.

    An id at or past E is dropped: no compute, and it adds nothing to the token's output. Of those, `E` says nothing
    more, and `E + 1 + e` says that the router had chosen expert `e` before its capacity ran out.
    """

    topk_ids: Tensor  # [T, K] int32
    topk_weights: Tensor  # [T, K] promote_types(x.dtype, float32), differentiable
    logits: Tensor  # [T, E] same dtype as topk_weights, differentiable, for the auxiliary losses


class Plan(NamedTuple):
    """How slots line up when sorted by expert: rows ``offsets[e]:offsets[e + 1]`` belong to expert e, slots ascending.

    R is a static bound on the rows kept: N unless the caller knows better. Rows at and past ``offsets[-1]`` are the
    tail: nobody reads them, they add nothing, and their gradient is zero.
    """

    order: Tensor  # [R] int32: the slot (t*K + k) of each sorted row; its token is order // top_k
    inverse: Tensor  # [N] int32: the sorted row of each slot; a value >= offsets[-1] means dropped
    offsets: Tensor  # [E + 1] int32
    top_k: int  # K


class ExpertWeights(NamedTuple):
    """The packed weights of the experts on this rank, in Hugging Face's in-memory layout (v5)."""

    up: Tensor  # [E, 2F, D], gate rows first, when the activation is gated; else [E, F, D]
    down: Tensor  # [E, D, F]
    up_bias: Tensor | None = None  # [E, 2F] or [E, F]
    down_bias: Tensor | None = None  # [E, D], weighted by topk_weights


class Balance(NamedTuple):
    """One layer's routing, reduced to what losses, statistics and the selection bias need; sums, so they add up.

    Add them over microbatches and ranks; divide by the number of tokens only in the loss.
    """

    counts: Tensor  # [E] int64: slots the router chose for each expert, those dropped for capacity included
    dropped: Tensor  # [] int64: slots that were dropped
    prob_sum: Tensor  # [E] differentiable: sum over tokens of the probability of each expert
    z_sum: Tensor  # [] differentiable: sum over tokens of logsumexp(logits)^2


class Output(NamedTuple):
    """What a model returns: next-token logits, and one Balance for each MoE block in order."""

    logits: Tensor  # [B, S, V]
    balances: tuple[Balance, ...]


Compute = Callable[..., Tensor]
"""``(x [S, D], topk_ids [S, K], topk_weights [S, K] | None, rows: int | None = None) -> [S, D]`` on local experts."""


class Router(Protocol):
    """Chooses K experts per token; an nn.Module, since routers own parameters (`weight` [E, D] first of all)."""

    def __call__(self, x: Tensor, topk_ids: Tensor | None = None) -> Routing:
        """Route x [T, D]; ids given are taken as they are (replay, forced balance) and only weighted."""
        ...

    def balance(self, routing: Routing) -> Balance:
        """Reduce a routing of this router to its Balance."""
        ...

    def update(self, counts: Tensor) -> None:
        """Adjust the router's state after an optimizer step, by counts [E] summed over microbatches and ranks."""
        ...


class Permutation(Protocol):
    """Makes plans and moves rows by them; stateless and differentiable."""

    def plan(self, topk_ids: Tensor, num_experts: int, rows: int | None = None) -> Plan:
        """Sort the slots of topk_ids [T, K] by expert, stably; `rows` bounds how many are kept (no host sync)."""
        ...

    def permute(self, x: Tensor, plan: Plan) -> Tensor:
        """Copy tokens x [T, D] to their rows [R, D]; the tail is zero."""
        ...

    def unpermute(self, rows: Tensor, plan: Plan, topk_weights: Tensor | None) -> Tensor:
        """Sum each token's rows [R, D], weighted by topk_weights [T, K] if given, to [T, D] in the rows' dtype."""
        ...


class ExpertKernel(Protocol):
    """Computes experts on unsorted tokens; stateless; x, weights and the result have one dtype."""

    def __call__(
        self, x: Tensor, plan: Plan, topk_weights: Tensor | None, weights: ExpertWeights
    ) -> Tensor:
        """Return y [T, D] = sum over k of topk_weights[t, k] * expert(x[t]); without weights each counts 1."""
        ...


class Exchange(Protocol):
    """Carries tokens to the ranks that hold their experts, has them computed there, and brings the sums back."""

    received: float  # rows that come to a rank for each of its own tokens, if all experts get the same; 0 without ranks

    def __call__(self, x: Tensor, routing: Routing, compute: Compute) -> Tensor:
        """Return y [T, D] for x [T, D]; `compute` may be called several times, on chunks."""
        ...


class Layout(NamedTuple):
    """What a strategy made of a model, as one rank sees it."""

    meshes: Mapping[
        str, Mapping[str, int]
    ]  # of which parameters: how many ranks along each dimension, outermost first
    working_set: int  # bytes, at most, that a step holds besides this rank's parameters and gradients: gathered ones


class Strategy(Protocol):
    """Lays a model out over devices. Constructed as ``cls(device=..., **options)``."""

    data: tuple[int, int]  # (rank, size) in sample order

    def unusable(self, model: nn.Module) -> str | None:
        """Say in one sentence why this (meta) model cannot be laid out so, and what would work; else None."""
        ...

    def layout(self, model: nn.Module) -> nn.Module:
        """Shard a model that stands on the meta device, where it stays, and install exchanges.

        ``to_empty(device=...)`` then allocates what this rank holds, and no more.
        """
        ...

    def describe(self, model: nn.Module) -> Layout:
        """Say how a model that was laid out lies, allocated or not."""
        ...

    def reduce(self, x: Tensor) -> Tensor:
        """Sum x over the data ranks."""
        ...

    def clip(self, model: nn.Module, max_norm: float) -> Tensor:
        """Scale all gradients to a global norm of at most max_norm; return the norm before."""
        ...


class Model(Protocol):
    """A language model. Constructed as ``cls(config, backends=..., device=..., dtype=...)``."""

    blocks: nn.ModuleList

    def __call__(self, ids: Tensor, cache: Any = None) -> Output:
        """Return the logits that follow each of ids [B, S]; a cache continues earlier calls."""
        ...


def logits_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of router logits and weights for x of `dtype`: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)
