"""The types that tokenyard's packages pass to each other, and the protocols of backends.

Shapes are trailing comments: T tokens, K experts per token, N = T*K slots, E experts, D model
width, F expert width, R rows of a plan, B sequences of S tokens, V vocabulary.

    router(x)  -> Routing
    experts(x, routing)
        exchange(x, routing, compute)
            compute:
                permutation.plan(ids) -> Plan
                kernel(x, plan, topk_weights, weights) -> [T, D]
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor, nn


class Routing(NamedTuple):
    """The experts of each token, and their weights.

    It is a pytree, so FSDP2's hooks and Dynamo handle the tensors inside.

    A slot whose id is E or higher is dropped: it is not computed and adds nothing to the output.
    `E` means dropped. `E + 1 + e` means dropped because expert `e` was full.
    """

    topk_ids: Tensor  # [T, K] int32
    topk_weights: Tensor  # [T, K] promote_types(x.dtype, float32), differentiable
    logits: Tensor  # [T, E] dtype of topk_weights, differentiable, for the auxiliary losses


class Plan(NamedTuple):
    """Slots sorted by expert.

    Rows ``offsets[e]:offsets[e + 1]`` belong to expert e, in ascending order of their slots. R is a
    static bound on the number of rows, N by default. Rows from ``offsets[-1]`` on are the tail:
    they are never read, add nothing, and have a zero gradient.
    """

    order: Tensor  # [R] int32: the slot (t*K + k) of each row; its token is order // top_k
    inverse: Tensor  # [N] int32: the row of each slot; a value >= offsets[-1] means dropped
    offsets: Tensor  # [E + 1] int32
    top_k: int  # K


class ExpertWeights(NamedTuple):
    """Packed weights of this rank's experts, in the in-memory layout of transformers 5."""

    up: Tensor  # [E, 2F, D], gate rows first, if the activation is gated; else [E, F, D]
    down: Tensor  # [E, D, F]
    up_bias: Tensor | None = None  # [E, 2F] or [E, F]
    down_bias: Tensor | None = None  # [E, D], weighted by topk_weights


class GradientSums(NamedTuple):
    """Where the gradients of expert weights are added over microbatches; Megatron's `main_grad`.

    They are contiguous, and in float32 for weights in 16 bits, else in the weights' dtype.
    """

    up: Tensor  # like that of ExpertWeights
    down: Tensor


class LowRank(NamedTuple):
    """Low-rank matrices (LoRA) of experts: W x becomes W x + s B A x for each adapted weight W.

    Those of `up` or of `down` are None if that weight has no adapter.
    """

    up_a: Tensor | None  # [E, rank, D]
    up_b: Tensor | None  # [E, 2F or F, rank]
    down_a: Tensor | None  # [E, rank, F]
    down_b: Tensor | None  # [E, D, rank]
    dropped: Tensor | None  # [T, D] x after dropout, the input of up_a; None means x
    mask: Tensor | None  # [R, F] bool: the activations that down_a sees; None means all
    up_scale: float  # s
    down_scale: float  # s, divided by the share that a mask keeps, so that the mean stays


class Balance(NamedTuple):
    """Sums over the tokens of one layer's routing, for losses, statistics and the selection bias.

    Add Balances over microbatches and ranks. Only the loss divides by the number of tokens.
    """

    counts: Tensor  # [E] int64: slots that selected each expert, those dropped for capacity too
    dropped: Tensor  # [] int64: slots that were dropped
    prob_sum: Tensor  # [E] differentiable: sum over tokens of the probability of each expert
    z_sum: Tensor  # [] differentiable: sum over tokens of logsumexp(logits)^2


IGNORED = -100
"""The id of a target that is not counted, as in ``F.cross_entropy``."""


class Targets(NamedTuple):
    """The tokens that a model should predict."""

    ids: Tensor  # [B, S] int64; IGNORED is not counted
    weights: Tensor | None = None  # [B, S] weight of each token in the loss; None means 1


PADDING = -1
"""The document id of a token that belongs to no document."""


class Documents(NamedTuple):
    """The documents of packed rows of tokens. Attention and positions never cross a document.

    Padding belongs to no document. It takes part in no routing, loss or statistic. Of the N parts
    that `offsets` delimit, each is a document, the padding of a row, or empty: empty ones at the
    end make N the same for every batch. `pack_documents` makes one from `ids`.
    """

    ids: Tensor  # [B, S] int32: a number for each document of a row; PADDING for no document
    positions: Tensor  # [B, S] int64: the position of each token in its document
    offsets: Tensor  # [N + 1] int32: where the parts of the B * S tokens begin, and B * S
    longest: int  # at least the tokens of the longest part

    @property
    def padding(self) -> Tensor:
        """Which tokens are padding [B, S]."""
        return self.ids == PADDING


class Output(NamedTuple):
    """A model's result: next-token logits, and the Balance of each MoE layer in order."""

    logits: Tensor  # [B, S, V]
    balances: tuple[Balance, ...]  # one for each MoE layer


class TokenLoss(NamedTuple):
    """A model's result for given targets: their loss, and the Balance of each MoE layer."""

    nats: Tensor  # [] float64, differentiable: sum over tokens of weight * cross-entropy
    balances: tuple[Balance, ...]  # one for each MoE layer


M = TypeVar("M", bound=nn.Module)

Compute = Callable[..., Tensor]
"""``(x [S, D], topk_ids [S, K], topk_weights [S, K] | None, rows: int | None = None) -> [S, D]``.

It computes the experts of this rank."""


class Router(Protocol):
    """Selects K experts for each token. An nn.Module, since it owns parameters.

    Constructed as ``cls(workload, **options)``; ``workload.router`` says what it computes. A class
    that reads ``workload.router.options`` names them in ``rule_options``, a tuple; any other option
    is an error.
    """

    weight: Tensor  # [E, D], the matrix of the logits

    def __call__(
        self, x: Tensor, topk_ids: Tensor | None = None, padding: Tensor | None = None
    ) -> Routing:
        """Route x [T, D]. Given ids [T, K] (replay, forced balance) are only weighted.

        Where `padding` [T] is true, the token is dropped and takes part in no capacity. It is
        passed for packed documents only, and so is that of `balance`.
        """
        ...

    def balance(self, routing: Routing, padding: Tensor | None = None) -> Balance:
        """Reduce a routing of this router to its Balance. `padding` [T] is left out of it."""
        ...

    def update(self, counts: Tensor) -> None:
        """Adjust the router's buffers after an optimizer step, without a host sync.

        `counts` [E] are ``Balance.counts``, summed over microbatches and ranks. A trainer that
        does not know yet whether the step is taken restores the buffers if it is not. Each keeps
        its shape and dtype. No other state may change: it would not be restored.
        """
        ...


class Permutation(Protocol):
    """Sorts slots by expert and moves rows. Stateless and differentiable."""

    def plan(self, topk_ids: Tensor, num_experts: int, rows: int | None = None) -> Plan:
        """Sort the slots of topk_ids [T, K] by expert, stably.

        `rows` bounds the number of rows that are kept, so that no host sync is needed.
        """
        ...

    def permute(self, x: Tensor, plan: Plan) -> Tensor:
        """Copy tokens x [T, D] to their rows [R, D]. The tail is zero."""
        ...

    def unpermute(self, rows: Tensor, plan: Plan, topk_weights: Tensor | None) -> Tensor:
        """Sum each token's rows [R, D] to [T, D], in the rows' dtype.

        topk_weights [T, K] weight the rows; None means 1.
        """
        ...


class ExpertKernel(Protocol):
    """Computes experts on unsorted tokens. Stateless. x, weights and the result have one dtype."""

    def __call__(
        self, x: Tensor, plan: Plan, topk_weights: Tensor | None, weights: ExpertWeights
    ) -> Tensor:
        """Return y [T, D], the sum over k of topk_weights[t, k] * expert(x[t]).

        Without topk_weights each expert counts 1.
        """
        ...


class LoraExpertKernel(ExpertKernel, Protocol):
    """An expert kernel that computes adapters, too. This part of the contract is optional.

    Core's grouped matmuls compute adapters of a higher rank than `max_lora_rank`, and those of
    kernels without that attribute.
    """

    max_lora_rank: int

    def with_adapter(
        self,
        x: Tensor,
        plan: Plan,
        topk_weights: Tensor | None,
        weights: ExpertWeights,
        low_rank: LowRank,
    ) -> Tensor:
        """Return y [T, D] like the call, with the adapters beside the weights.

        It must be differentiable in x, topk_weights, the matrices and ``low_rank.dropped``, and in
        the weights that require a gradient.
        """
        ...


class AddingExpertKernel(ExpertKernel, Protocol):
    """An expert kernel that adds gradients of weights to sums. This part is optional."""

    adds_to_sums: bool
    """Whether `with_sums` may be called. A kernel without this attribute does not add.

    A subclass that overrides the call alone does not add: it would inherit the sums of the base.
    """

    def with_sums(
        self,
        x: Tensor,
        plan: Plan,
        topk_weights: Tensor | None,
        weights: ExpertWeights,
        sums: GradientSums,
    ) -> Tensor:
        """Return y [T, D] like the call.

        The backward pass adds the gradients of up and down to the sums, each number once, and gives
        autograd none for these weights. So no hook of theirs is called.
        """
        ...


class CachingExpertKernel(ExpertKernel, Protocol):
    """An expert kernel that keeps what it computed from weights. This part is optional."""

    weights_have_versions: bool
    """Whether ``Tensor._version`` of a weight tells that it changed.

    It is False at first: FSDP gathers weights into the same memory without a new version. A
    strategy that leaves parameters where they are sets it.
    """

    captures_weight_copies: bool
    """Whether a CUDA graph that is captured reads the copies, which `renew_weight_copies` made.

    It is False at first: a graph computes copies in each replay.
    ``weight_copies.captured_weight_copies`` sets it during a capture.
    """

    def renew_weight_copies(self, weights: ExpertWeights) -> None:
        """Compute the copies of weights that changed, in the memory of those that exist.

        Call it before the capture of a CUDA graph that reads them, and before each replay.
        """
        ...

    def weight_copy_bytes(self, numbers: int) -> int:
        """Return the bytes that it keeps of so many numbers of weights, if they have versions."""
        ...


class SavingExpertKernel(ExpertKernel, Protocol):
    """An expert kernel that saves something else than x and z. This part is optional."""

    def saved_bytes_per_row(self, width: int) -> int:
        """Return the bytes that it saves for each row, besides x, in a dtype of `width` bytes."""
        ...


class AdvisingExpertKernel(ExpertKernel, Protocol):
    """An expert kernel that knows of options with a gain. This part of the contract is optional."""

    def advice(self, keeps_copies: bool) -> str | None:
        """Return a sentence on what an option would gain and cost, which `check` prints, or None.

        `keeps_copies` says whether copies of the weights would be kept from one pass to the next.
        It is not called for experts with adapters.
        """
        ...


class Exchange(Protocol):
    """Sends tokens to the ranks that hold their experts, and returns the sums of the results."""

    rows_per_token: float  # rows that arrive at a rank per local token, if routing is uniform

    def __call__(self, x: Tensor, routing: Routing, compute: Compute) -> Tensor:
        """Return y [T, D] for x [T, D]. `compute` may be called once for each of several chunks."""
        ...


class SendingExchange(Exchange, Protocol):
    """An exchange that tells how many bytes it sends. This part of the contract is optional."""

    def row_bytes(self, width: int) -> int:
        """Return the bytes of a dispatched row, whose numbers had `width` bytes."""
        ...

    def sent_bytes_per_token(self, width: int) -> int:
        """Return the bytes that a rank sends to other ranks for each of its tokens.

        They are those of a forward pass, and as many of a backward pass, if routing is uniform.
        `width` are the bytes of the compute dtype.
        """
        ...


class BoundedExchange(Exchange, Protocol):
    """An exchange that bounds a rank's slots before it counts them. This part is optional."""

    slots: float  # activations of so many times the mean number of slots are allocated


class BufferedExchange(Exchange, Protocol):
    """An exchange with a buffer on each rank, which all layers share. This part is optional."""

    def buffer_bytes(self, tokens: int, width: int) -> int:
        """Return the bytes of a rank's buffer if each rank has so many tokens.

        `width` are the bytes of the compute dtype.
        """
        ...


class ShardingReport(NamedTuple):
    """A model's layout over ranks, as seen by one of them."""

    meshes: Mapping[str, Mapping[str, int]]  # parameter group -> mesh dimension -> ranks
    working_set: int  # the most bytes of gathered parameters and gradients that a step holds


class Strategy(Protocol):
    """Lays a model out over devices. Constructed as ``cls(device=..., **options)``."""

    data: tuple[int, int]  # (rank, size) in sample order

    def unusable(self, model: nn.Module) -> str | None:
        """Return one sentence if this meta-device model cannot be laid out, else None.

        The sentence says why, and what would work.
        """
        ...

    def layout(self, model: M) -> M:
        """Shard a model on the meta device, install exchanges, and return it.

        ``tokenyard.sharded.allocate`` then allocates what this rank holds, and no more.
        """
        ...

    def describe(self, model: nn.Module) -> ShardingReport:
        """Report the layout of a laid-out model, on the meta device or allocated."""
        ...

    def reduce(self, x: Tensor) -> Tensor:
        """Return the sum of x over the data ranks."""
        ...

    def gradient_norm(self, model: nn.Module) -> Tensor:
        """Return the global 2-norm of all gradients, a scalar in float32 at least.

        It is the same on every rank, and not finite if a gradient on any rank is not.
        """
        ...


def logits_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of router logits and weights for x of `dtype`: at least float32."""
    return torch.promote_types(dtype, torch.float32)
