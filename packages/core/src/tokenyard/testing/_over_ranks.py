"""What one rank does in the standard tests of exchanges and strategies over several processes."""

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
from tokenyard.numerics import relative_error
from tokenyard.permutations import TorchPermutation
from tokenyard.strategies import SingleStrategy
from tokenyard.testing import _oracle
from tokenyard.testing._cases import make_case, routings
from tokenyard.workload import Workload

EXPERTS, DIM = 4, 8


class Net(nn.Module):
    """A linear layer before one with experts."""

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
    """Return the relative errors of y and of the gradients of x, topk_weights and this rank's up and down weights.

    Every rank knows all tokens and weights; it exchanges `shares[rank]` tokens of its own, and compares with computing
    in place.
    """
    torch.manual_seed(seed)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    workload = Workload(DIM, 12, EXPERTS, 2, dtype=torch.float64, expert_parallel=ranks)
    case = make_case(workload, routings(sum(shares), EXPERTS, 2)[routing])
    exchange = Backend("under test", path).load()(
        workload, TorchPermutation(workload), dist.group.WORLD, **options
    )
    each, first = EXPERTS // ranks, sum(shares[:rank])
    mine, own = slice(first, first + shares[rank]), slice(rank * each, (rank + 1) * each)
    x, weights = (case.tensors[n].detach()[mine].requires_grad_() for n in ("x", "topk_weights"))
    up, down = (case.tensors[n].detach()[own].requires_grad_() for n in ("up", "down"))

    def compute(
        rows: Tensor, ids: Tensor, gates: Tensor | None, bound: int | None = None
    ) -> Tensor:
        return _oracle.experts(rows, ids, gates, ExpertWeights(up, down), "swiglu")

    y = exchange(x, Routing(case.ids[mine], weights, x.new_zeros(shares[rank], EXPERTS)), compute)
    got = [y, *torch.autograd.grad(y, [x, weights, up, down], case.dy[mine])]
    leaves = [case.tensors[n] for n in ("x", "topk_weights", "up", "down")]
    whole = _oracle.experts(leaves[0], case.ids, leaves[1], case.weights(), "swiglu")
    dx, dweights, dup, ddown = torch.autograd.grad(whole, leaves, case.dy)
    want = [whole[mine], dx[mine], dweights[mine], dup[own], ddown[own]]
    return [
        float(relative_error(a, b)) if b.numel() else float(a.numel()) for a, b in zip(got, want)
    ]


class Laid(NamedTuple):
    """What a strategy made of a model, beside one process: relative errors, and what all ranks must agree on."""

    data: tuple[int, int]
    gradients: float  # the worst of all parameters
    norm: float
    clipped: float
    reduced: float
    held: int  # numbers that this rank holds


def strategy_on_rank(
    path: str, options: Mapping[str, Any], expert_parallel: int, case: str, seed: int
) -> Laid | str:
    """Lay a model out, run this rank's share of a batch, clip; or return why the strategy is unusable.

    `case` is "even", "idle" (the last rank has no tokens) or "frozen" (experts are not trained).
    """
    torch.manual_seed(seed)
    strategy = Backend("under test", path).load()(device="cpu", **options)
    rank, ranks = strategy.data
    tokens = torch.randn(12, DIM, dtype=torch.float64)
    alone = _laid_out(SingleStrategy(), 1, case, seed)
    with torch.device("meta"):
        reason = strategy.unusable(Net(_workload(expert_parallel)))
    if reason is not None:
        return str(reason)
    model = _laid_out(strategy, expert_parallel, case, seed)
    held = sum((p.to_local() if isinstance(p, DTensor) else p).numel() for p in model.parameters())
    alone(tokens).square().sum().backward()
    busy = ranks - (case == "idle" and ranks > 1)
    shares = (*tokens.tensor_split(busy), tokens[:0])
    model(shares[rank]).square().sum().backward()
    pairs = list(zip(_gradients(model), _gradients(alone)))
    want = torch.cat([b.flatten() for _, b in pairs]).norm()
    errors = [float(relative_error(a, b)) for a, b in pairs]
    norm = float(relative_error(strategy.clip(model, float(want) / 2).cpu(), want))
    clipped = torch.cat([g.flatten() for g in _gradients(model)]).norm()
    total = strategy.reduce(torch.tensor([float(rank + 1), 1.0]))
    summed = torch.tensor([ranks * (ranks + 1) / 2, float(ranks)])
    return Laid(
        (rank, ranks),
        max(errors),
        norm,
        abs(float(clipped / want) - 0.5),
        float((total - summed).abs().max()) if total.shape == summed.shape else math.inf,
        held,
    )


def _workload(expert_parallel: int) -> Workload:
    return Workload(DIM, 12, EXPERTS, 2, dtype=torch.float64, expert_parallel=expert_parallel)


def _laid_out(strategy: Any, expert_parallel: int, case: str, seed: int) -> nn.Module:
    """Lay out a model, and initialize it from the seed."""
    with torch.device("meta"):
        model: nn.Module = Net(_workload(expert_parallel))
    for moe in moe_layers(model) if case == "frozen" else ():
        moe.experts.requires_grad_(False)
    model = strategy.layout(model).to_empty(device="cpu")
    initialize(model, seed)
    return model


@torch.no_grad()
def initialize(model: nn.Module, seed: int) -> None:
    """Draw every parameter from the seed alone: each shard is cut from the whole parameter."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        whole = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.4
        _fill(parameter, whole)


def full(tensor: Tensor) -> Tensor:
    """Return a copy of a tensor, gathered from its shards; a collective if it is sharded."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def _fill(parameter: Tensor, whole: Tensor) -> None:
    if not isinstance(parameter, DTensor):
        parameter.copy_(whole)
    elif parameter.to_local().numel():
        (chunk,) = (
            parameter.__create_chunk_list__()
        )  # how torch's checkpoints ask a shard where it lies
        parameter.to_local().copy_(
            whole[tuple(slice(o, o + s) for o, s in zip(chunk.offsets, chunk.sizes))]
        )


def _gradients(model: nn.Module) -> list[Tensor]:
    return [full(p.grad) for p in model.parameters() if p.grad is not None]
