"""A small model with experts, trained in any layout, and everything that must not depend on the layout."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from tokenyard import MoE, RoutingRule, Workload, default_registry, load_balancing_loss, z_loss
from tokenyard.draw import draw_rows

DIM, FFN, EXPERTS = 8, 12, 8


class Layout(NamedTuple):
    """Who computes what."""

    strategy: str = "single"
    ranks: int = 1
    expert_parallel: int = 1
    exchange: str = "auto"
    replicate: int = 1
    chunks: int = 1

    def __str__(self):
        name = "hsdp" if self.replicate > 1 else self.strategy
        parts = [f"{name}-{self.ranks}"]
        if self.expert_parallel > 1:
            parts.append(f"ep{self.expert_parallel}-{self.exchange}")
        return "-".join(parts + ([f"chunks{self.chunks}"] if self.chunks > 1 else []))


class Case(NamedTuple):
    """What is computed."""

    routing: str = "natural"  # one_expert, idle_rank, empty_batch, every_expert, indivisible
    accumulation: int = 1
    recompute: bool = False
    frozen: bool = False
    dtype: torch.dtype = torch.float64
    steps: int = 1
    device: str = "cpu"
    experts: int = EXPERTS

    @property
    def top_k(self):
        return self.experts if self.routing == "every_expert" else 2

    def __str__(self):
        marks = [
            self.routing,
            f"x{self.accumulation}",
            "recompute" if self.recompute else "",
            "frozen" * self.frozen,
        ]
        return "-".join(
            [mark for mark in marks if mark]
            + [str(self.dtype).removeprefix("torch."), f"{self.steps}"]
        )


class Block(nn.Module):
    def __init__(self, workload, backends):
        super().__init__()
        self.norm = nn.LayerNorm(DIM, dtype=workload.dtype)
        self.mix = nn.Linear(DIM, DIM, dtype=workload.dtype)
        self.moe = MoE(workload, backends=backends, dtype=workload.dtype)

    def forward(self, x, ids):
        x = x + self.mix(x).tanh()
        y, routing = self.moe(self.norm(x), ids)
        return x + y, self.moe.router.balance(routing)


class Net(nn.Module):
    def __init__(self, workload, backends):
        super().__init__()
        self.first = nn.Linear(DIM, DIM, dtype=workload.dtype)
        self.blocks = nn.ModuleList(Block(workload, backends) for _ in range(2))

    def forward(self, x, ids):
        x, balances = self.first(x), []
        for block, chosen in zip(self.blocks, ids):
            x, balance = block(x, chosen)
            balances.append(balance)
        return x, balances


def build(layout: Layout, case: Case):
    """Return the strategy, and the model laid out and initialised."""
    rule = RoutingRule(normalize=1.0)
    workload = Workload(
        DIM,
        FFN,
        case.experts,
        case.top_k,
        bias=True,
        router=rule,
        dtype=case.dtype,
        device=case.device,
        expert_parallel=layout.expert_parallel,
    )
    exchange = {"name": layout.exchange, "validate": True, "chunks": layout.chunks}
    backends = {
        "experts": "torch" if case.device == "cpu" else "auto",
        "exchange": exchange if layout.expert_parallel > 1 else "local",
    }
    options = {"replicate": layout.replicate} if layout.replicate > 1 else {}
    chosen = default_registry().choose("strategy", {"name": layout.strategy, **options})
    strategy = chosen.construct(device=case.device)
    with torch.device("meta"):
        model = Net(workload, backends)
    assert strategy.unusable(model) is None
    for block in model.blocks if case.frozen else ():
        block.moe.experts.requires_grad_(False)
    model = strategy.layout(model).to_empty(device=case.device)
    initialise(model)
    if case.recompute:
        for block in model.blocks:
            block.forward = _recomputed(block.forward)
    return strategy, model


def _recomputed(forward):
    return lambda *args: checkpoint(forward, *args, use_reentrant=False)


@torch.no_grad()
def initialise(model):
    """The same values in every layout: each row of a parameter by a seed of its own."""
    for name, parameter in model.named_parameters():
        whole, first, local = tuple(parameter.shape), (0,) * parameter.dim(), parameter
        if isinstance(parameter, DTensor):
            local = parameter.to_local()
            if not local.numel():
                continue
            (chunk,) = parameter.__create_chunk_list__()
            first = tuple(chunk.offsets)
        draw_rows(local, 5, name, 0.4, whole, first)
    for buffer in model.buffers():
        buffer.zero_()


def batch_of(case: Case) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
    """Return the global batch x [T, D], and for each block the ids [T, K] that it is given, or None."""
    count = 37 if case.routing == "indivisible" else 24
    generator = torch.Generator().manual_seed(11)
    x = torch.randn(count, DIM, generator=generator, dtype=torch.float64).to(case.dtype)
    experts = case.experts
    if case.routing == "one_expert":
        return x, [
            torch.tensor([[3, 4]]).int().repeat(count, 1),
            torch.tensor([[0, 1]]).int().repeat(count, 1),
        ]
    if case.routing == "idle_rank":
        experts //= 2  # the others, and their ranks, get nothing
    elif case.dtype == torch.float64:
        return x, [None, None]
    scores = torch.rand(
        2, count, experts, generator=generator
    )  # float32 would break near ties of the router's own
    return x, list(scores.topk(case.top_k).indices.int())


def share_of(tokens: torch.Tensor, case: Case, rank: int, ranks: int) -> torch.Tensor:
    """Return a rank's part of a microbatch; with an empty batch, the last of several ranks has none."""
    if case.routing == "empty_batch" and ranks > 1:
        return tokens[:0] if rank == ranks - 1 else tokens.tensor_split(ranks - 1)[rank]
    return tokens.tensor_split(ranks)[rank]


def train(layout: Layout, case: Case) -> dict[str, torch.Tensor]:
    """Take the case's steps; return outputs, gradients, norm and losses of the first, and the parameters afterwards."""
    strategy, model = build(layout, case)
    groups: dict = {}
    for parameter in (p for p in model.parameters() if p.requires_grad):
        groups.setdefault(getattr(parameter, "device_mesh", None), []).append(parameter)
    optimizer = torch.optim.AdamW(
        [{"params": g} for g in groups.values()], lr=3e-3, weight_decay=0.1
    )
    found: dict[str, torch.Tensor] = {}
    for step in range(case.steps):
        seen = _backward(strategy, model, layout, case)
        norm = strategy.clip(model, 0.5)
        if step == 0:
            found = (
                seen
                | {"norm": norm}
                | {
                    f"grad {name}": whole(p.grad)
                    for name, p in model.named_parameters()
                    if p.requires_grad
                }
            )
        optimizer.step()
        optimizer.zero_grad()
    return found | {f"final {name}": whole(p) for name, p in model.named_parameters()}


def _backward(strategy, model, layout, case):
    """Run forward and backward over the microbatches of the batch; return its outputs and auxiliary loss."""
    rank, world = strategy.data
    x, ids = batch_of(case)
    x, ids = x.to(case.device), [None if i is None else i.to(case.device) for i in ids]
    outputs, auxiliary = (
        [],
        torch.zeros((), dtype=torch.promote_types(case.dtype, torch.float32), device=case.device),
    )
    for tokens in torch.arange(len(x), device=case.device).tensor_split(case.accumulation):
        mine = share_of(tokens, case, rank, world)
        y, balances = model(x[mine], [None if i is None else i[mine] for i in ids])
        balances = [b._replace(counts=strategy.reduce(b.counts)) for b in balances]
        of_tokens = load_balancing_loss(balances, len(tokens), case.top_k) + z_loss(
            balances, len(tokens)
        )
        share = of_tokens * len(tokens) / len(x)
        ((y - 1).square().sum() / len(x) + 0.1 * share).backward()
        outputs.append(strategy.reduce(torch.zeros_like(x).index_copy(0, mine, y.detach())))
        auxiliary += strategy.reduce(share)
    return {"y": torch.stack(outputs).sum(0), "auxiliary": auxiliary}


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def on_rank(layout: Layout, cases: list[Case]):
    """Return what `train` finds in each case, of rank 0; the others only say that they found the same norm."""
    found = [train(layout, case) for case in cases]
    if dist.get_rank():
        return [each["norm"].item() for each in found]
    return [{name: value.double().cpu().numpy() for name, value in each.items()} for each in found]


def numbers_of_experts(layout: Layout) -> int:
    """Return how many numbers of two experts a rank holds."""
    _, model = build(layout, Case(experts=2))
    return sum(
        p.to_local().numel() for block in model.blocks for p in block.moe.experts.parameters()
    )
