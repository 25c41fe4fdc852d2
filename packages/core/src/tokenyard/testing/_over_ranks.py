"""Functions that each rank runs in the standard tests of exchanges and strategies."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tokenyard.backend import Backend
from tokenyard.interfaces import ExpertWeights, Routing
from tokenyard.moe import MoE, moe_layers
from tokenyard.permutations import TorchPermutation
from tokenyard.strategies import SingleStrategy
from tokenyard.testing import _oracle
from tokenyard.testing._cases import Case, make_case, routings
from tokenyard.tolerance import relative_error
from tokenyard.workload import Workload

EXPERTS = 4
DIM = 8
FFN_DIM = 12
TOP_K = 2


class Net(nn.Module):
    """A linear layer followed by an MoE layer."""

    def __init__(self, workload: Workload, backends: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        self.first = nn.Linear(DIM, DIM, dtype=workload.dtype)
        self.moe = MoE(workload, backends=backends, dtype=workload.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Return y [T, D]."""
        y: Tensor = self.moe(self.first(x))[0]
        return y


def exchange_on_rank(
    path: str, options: Mapping[str, Any], routing: str, shares: list[int], seed: int
) -> list[float]:
    """Return the relative errors of an exchange on this rank: y, dx, dweights, dup, ddown.

    The weight gradients are those of the local experts. Every rank knows all tokens and weights. It
    exchanges `shares[rank]` tokens, and compares with one process that computes all of them.
    """
    torch.manual_seed(seed)
    rank = dist.get_rank()
    ranks = dist.get_world_size()
    workload = _workload(expert_parallel=ranks)
    case = make_case(workload, routings(sum(shares), EXPERTS, TOP_K)[routing])
    exchange = Backend("under test", path).load()(
        workload, TorchPermutation(workload), dist.group.WORLD, **options
    )
    first = sum(shares[:rank])
    local_tokens = slice(first, first + shares[rank])
    experts_per_rank = EXPERTS // ranks
    local_experts = slice(rank * experts_per_rank, (rank + 1) * experts_per_rank)

    # this rank's part, with leaves of its own
    x, weights = (_leaf(case.tensors[name], local_tokens) for name in ("x", "topk_weights"))
    up, down = (_leaf(case.tensors[name], local_experts) for name in ("up", "down"))

    def compute(
        rows: Tensor, ids: Tensor, gates: Tensor | None, bound: int | None = None
    ) -> Tensor:
        return _oracle.experts(rows, ids, gates, ExpertWeights(up, down), "swiglu")

    logits = x.new_zeros(shares[rank], EXPERTS)
    y = exchange(x, Routing(case.ids[local_tokens], weights, logits), compute)
    gradients = torch.autograd.grad(y, [x, weights, up, down], case.dy[local_tokens])
    want = _on_one_process(case, local_tokens, local_experts)
    return [_error(got, expected) for got, expected in zip([y, *gradients], want)]


def _leaf(tensor: Tensor, part: slice) -> Tensor:
    return tensor.detach()[part].requires_grad_()


def _on_one_process(case: Case, tokens: slice, experts: slice) -> list[Tensor]:
    """Compute the whole case; return y, dx, dweights, dup and ddown of one rank's part."""
    leaves = [case.tensors[name] for name in ("x", "topk_weights", "up", "down")]
    y = _oracle.experts(leaves[0], case.ids, leaves[1], case.weights(), "swiglu")
    dx, dweights, dup, ddown = torch.autograd.grad(y, leaves, case.dy)
    return [y[tokens], dx[tokens], dweights[tokens], dup[experts], ddown[experts]]


def _error(got: Tensor, want: Tensor) -> float:
    """Return the relative error; for an empty `want`, the number of elements of `got`."""
    return float(relative_error(got, want)) if want.numel() else float(got.numel())


class StrategyErrors(NamedTuple):
    """How a strategy on this rank differs from one process: relative errors."""

    data: tuple[int, int]  # the strategy's (rank, size)
    gradients: float  # the maximum over all parameters
    norm: float
    reduced: float
    held: int  # number of parameter elements on this rank


def strategy_on_rank(
    path: str, options: Mapping[str, Any], expert_parallel: int, case: str, seed: int
) -> StrategyErrors | str:
    """Train a sharded model on this rank's tokens, and compare it with one process.

    `case` is "even", "idle" (the last rank has no tokens) or "frozen" (experts are not trained).
    Returns the reason instead if the strategy is unusable.
    """
    torch.manual_seed(seed)
    strategy = Backend("under test", path).load()(device="cpu", **options)
    tokens = torch.randn(12, DIM, dtype=torch.float64)
    with torch.device("meta"):
        reason = strategy.unusable(Net(_workload(expert_parallel)))
    if reason is not None:
        return str(reason)
    single = _laid_out(SingleStrategy(), 1, case, seed)
    model = _laid_out(strategy, expert_parallel, case, seed)
    held = sum((p.to_local() if isinstance(p, DTensor) else p).numel() for p in model.parameters())
    single(tokens).square().sum().backward()
    model(_local_tokens(tokens, strategy.data, case)).square().sum().backward()

    want = _gradients(single)
    want_norm = torch.cat([gradient.flatten() for gradient in want]).norm()
    errors = [float(relative_error(got, b)) for got, b in zip(_gradients(model), want)]
    norm = strategy.gradient_norm(model).cpu()
    return StrategyErrors(
        data=strategy.data,
        gradients=max(errors),
        norm=float(relative_error(norm, want_norm)),
        reduced=_reduce_error(strategy),
        held=held,
    )


def _local_tokens(tokens: Tensor, data: tuple[int, int], case: str) -> Tensor:
    rank, ranks = data
    busy = ranks - 1 if case == "idle" and ranks > 1 else ranks
    shares = (*tokens.tensor_split(busy), tokens[:0])
    return shares[rank]


def _reduce_error(strategy: Any) -> float:
    rank, ranks = strategy.data
    total = strategy.reduce(torch.tensor([float(rank + 1), 1.0]))
    want = torch.tensor([ranks * (ranks + 1) / 2, float(ranks)])
    return float((total - want).abs().max()) if total.shape == want.shape else math.inf


def _workload(expert_parallel: int) -> Workload:
    return Workload(
        DIM, FFN_DIM, EXPERTS, TOP_K, dtype=torch.float64, expert_parallel=expert_parallel
    )


def _laid_out(strategy: Any, expert_parallel: int, case: str, seed: int) -> nn.Module:
    """Return a sharded model. Its full parameters depend on `seed` alone, not on the strategy."""
    with torch.device("meta"):
        model: nn.Module = Net(_workload(expert_parallel))
    for moe in moe_layers(model) if case == "frozen" else ():
        moe.experts.requires_grad_(False)
    model = strategy.layout(model).to_empty(device="cpu")
    initialize(model, seed)
    return model


@torch.no_grad()
def initialize(model: nn.Module, seed: int) -> None:
    """Initialise all parameters from `seed`, with the same values for every strategy."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.4
        _fill(parameter, values)


def full(tensor: Tensor) -> Tensor:
    """Return a copy of a tensor, gathered from its shards; a collective if it is sharded."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def _fill(parameter: Tensor, values: Tensor) -> None:
    """Copy values into a parameter, or its local part into a DTensor."""
    if not isinstance(parameter, DTensor):
        parameter.copy_(values)
    elif parameter.to_local().numel():
        # torch's checkpoints find the position of a shard in this way
        (chunk,) = parameter.__create_chunk_list__()
        bounds = zip(chunk.offsets, chunk.sizes)
        parameter.to_local().copy_(values[tuple(slice(o, o + size) for o, size in bounds)])


def _gradients(model: nn.Module) -> list[Tensor]:
    """Return copies of all gradients, gathered from their shards."""
    return [full(p.grad) for p in model.parameters() if p.grad is not None]
