"""A small MoE model trained in any layout, with all results that must not depend on the layout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from tokenyard import (
    Balance,
    LoraSettings,
    MoE,
    RoutingRule,
    Strategy,
    Workload,
    add_lora,
    default_registry,
    load_balancing_loss,
    z_loss,
)
from tokenyard.fp8 import BLOCK, dequantize, quantize_rows
from tokenyard.interfaces import Compute, Routing
from tokenyard.moe import moe_layers
from tokenyard.recompute import recomputed
from tokenyard.sharded import local_part
from tokenyard.testing._over_ranks import DIM, full, initialize
from tokenyard_train.config.optimizer import OptimizerConfig
from tokenyard_train.engine.optimizer import build_optimizer

FFN = 12
EXPERTS = 8
LORA = LoraSettings(4, 6.0)


class Layout(NamedTuple):
    """A strategy over some ranks, and the exchange between them."""

    strategy: str = "single"
    ranks: int = 1
    expert_parallel: int = 1
    exchange: str = "auto"
    replicate: int = 1
    chunks: int = 1
    transfers: str = "auto"  # of fsdp

    def __str__(self) -> str:
        parts = [f"{self.kind}-{self.ranks}"]
        if self.expert_parallel > 1:
            parts.append(f"ep{self.expert_parallel}-{self.exchange}")
        if self.chunks > 1:
            parts.append(f"chunks{self.chunks}")
        if self.transfers != "auto":
            parts.append(self.transfers)
        return "-".join(parts)

    @property
    def kind(self) -> str:
        return "hsdp" if self.replicate > 1 else self.strategy


class Case(NamedTuple):
    """The routing, batch and precision of a training run, whatever its layout."""

    # one_expert, idle_rank, empty_batch, every_expert, indivisible, dropped
    routing: str = "natural"
    accumulation: int = 1
    recompute: str = ""  # whole, selective
    frozen: bool = False
    lora: bool = False
    dtype: torch.dtype = torch.float64
    steps: int = 1
    device: str = "cpu"
    experts: int = EXPERTS
    muon: bool = False  # else AdamW
    moments: str = "fp32"  # bf16, 8bit
    fp8: bool = False  # on the wire, or emulated by one process

    @property
    def top_k(self) -> int:
        return self.experts if self.routing == "every_expert" else 2

    @property
    def dim(self) -> int:
        if self.moments == "8bit":
            return 64  # rows have a block
        return 2 * BLOCK if self.fp8 else DIM

    def __str__(self) -> str:
        parts = [self.routing, f"x{self.accumulation}"]
        parts += [f"recompute_{self.recompute}"] * bool(self.recompute)
        parts += ["frozen"] * self.frozen
        parts += ["lora"] * self.lora
        parts += ["muon"] * self.muon
        parts += [f"moments_{self.moments}"] * (self.moments != "fp32")
        parts += ["fp8"] * self.fp8
        return "-".join([*parts, str(self.dtype).removeprefix("torch."), f"{self.steps}"])


class _Quantized(torch.autograd.Function):
    """Rounds rows to FP8 in the forward pass, or their gradient in the backward pass."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, backward: bool) -> Tensor:
        ctx.backward = backward
        return rows.view_as(rows) if backward else in_fp8(rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return in_fp8(grad) if ctx.backward else grad, None


def in_fp8(rows: Tensor) -> Tensor:
    return dequantize(quantize_rows(rows)).to(rows.dtype)


class EmulatedWire:
    """What an exchange in FP8 computes, by one process."""

    rows_per_token = 0.0

    def __call__(self, x: Tensor, routing: Routing, compute: Compute) -> Tensor:
        y = compute(_Quantized.apply(x, False), routing.topk_ids, routing.topk_weights)
        result: Tensor = _Quantized.apply(y, True)
        return result


class Block(nn.Module):
    def __init__(self, workload: Workload, backends: Mapping[str, Any]):
        super().__init__()
        self.norm = nn.LayerNorm(workload.dim, dtype=workload.dtype)
        self.mix = nn.Linear(workload.dim, workload.dim, dtype=workload.dtype)
        self.moe = MoE(workload, backends=backends, dtype=workload.dtype)

    def forward(self, x: Tensor, topk_ids: Tensor | None) -> tuple[Tensor, Balance]:
        x = x + self.mix(x).tanh()
        y, routing = self.moe(self.norm(x), topk_ids)
        return x + y, self.moe.router.balance(routing)


class Net(nn.Module):
    """A linear layer before two blocks with experts."""

    def __init__(self, workload: Workload, backends: Mapping[str, Any]):
        super().__init__()
        self.first = nn.Linear(workload.dim, workload.dim, dtype=workload.dtype)
        self.blocks = nn.ModuleList(Block(workload, backends) for _ in range(2))

    def forward(self, x: Tensor, topk_ids: Sequence[Tensor | None]) -> tuple[Tensor, list[Balance]]:
        x = self.first(x)
        balances = []
        for block, ids in zip(self.blocks, topk_ids):
            x, balance = block(x, ids)
            balances.append(balance)
        return x, balances


def build(layout: Layout, case: Case) -> tuple[Strategy, nn.Module]:
    """Return the strategy, and the model, laid out and initialized."""
    # a collective that hangs fails, and is named, before the call of a rank is given up
    options: dict[str, Any] = {"timeout": 100.0} if layout.ranks > 1 else {}
    options |= {"replicate": layout.replicate} if layout.replicate > 1 else {}
    options |= {"transfers": layout.transfers} if layout.transfers != "auto" else {}
    chosen = default_registry().choose("strategy", {"name": layout.strategy, **options})
    strategy = chosen.construct(device=case.device)
    with torch.device("meta"):
        model: Any = Net(workload_of(layout, case), backends_of(layout, case))
    assert strategy.unusable(model) is None
    for block in model.blocks if case.frozen else ():
        block.moe.experts.requires_grad_(False)
    if case.lora:
        add_lora(model, LORA)
    model = strategy.layout(model).to_empty(device=case.device)
    initialize(model, seed=5)
    for buffer in model.buffers():
        buffer.zero_()
    for moe in moe_layers(model) if case.fp8 and layout.expert_parallel == 1 else ():
        moe.experts.exchange = EmulatedWire()
    for block in model.blocks if case.recompute else ():
        block.forward = recomputed(block.forward, case.recompute == "selective")
    return strategy, model


def workload_of(layout: Layout, case: Case) -> Workload:
    return Workload(
        case.dim,
        FFN,
        case.experts,
        case.top_k,
        bias=True,
        router=RoutingRule(normalize=1.0),
        dtype=case.dtype,
        device=torch.device(case.device),
        expert_parallel=layout.expert_parallel,
    )


def backends_of(layout: Layout, case: Case) -> dict[str, Any]:
    exchange: dict[str, Any] = {"name": layout.exchange}
    if layout.exchange != "symmetric_memory":
        exchange |= {"validate": True, "chunks": layout.chunks}
    exchange |= {"precision": "fp8"} if case.fp8 else {}
    return {
        "experts": "torch" if case.device == "cpu" else "auto",
        "exchange": exchange if layout.expert_parallel > 1 else "local",
    }


def batch_of(case: Case) -> tuple[Tensor, list[Tensor | None]]:
    """Return the global batch x [T, D], and for each block the forced ids [T, K], or None."""
    count = 37 if case.routing == "indivisible" else 24
    generator = torch.Generator().manual_seed(11)
    x = torch.randn(count, case.dim, generator=generator, dtype=torch.float64).to(case.dtype)
    experts = case.experts
    if case.routing == "one_expert":
        return x, [torch.tensor([pair]).int().repeat(count, 1) for pair in ([3, 4], [0, 1])]
    if case.routing == "dropped":
        ids = torch.rand(2, count, experts + 2, generator=generator).topk(case.top_k).indices
        return x, list(ids.int())  # those from E on are dropped
    if case.routing == "idle_rank":
        experts //= 2  # the ranks that hold the other experts get no tokens
    elif case.dtype == torch.float64:
        return x, [None, None]
    # in float32, rounding breaks near ties differently, so the router may not choose
    scores = torch.rand(2, count, experts, generator=generator)
    return x, list(scores.topk(case.top_k).indices.int())


def share_of(tokens: Tensor, case: Case, rank: int, ranks: int) -> Tensor:
    """Return a rank's part of a microbatch; for "empty_batch" the last rank has none."""
    if case.routing == "empty_batch" and ranks > 1:
        return tokens[:0] if rank == ranks - 1 else tokens.tensor_split(ranks - 1)[rank]
    return tokens.tensor_split(ranks)[rank]


def train(layout: Layout, case: Case) -> dict[str, Tensor]:
    """Take the case's steps, and return what must be equal in every layout.

    These are the outputs, auxiliary loss, gradients and norm of the first step, and the parameters
    after the last step.
    """
    strategy, model = build(layout, case)
    optimizer = optimizer_of(case, model)
    results: dict[str, Tensor] = {}
    for step in range(case.steps):
        outputs = forward_backward(strategy, model, case)
        norm = strategy.gradient_norm(model)
        if step == 0:
            results = outputs | {"norm": norm} | gradients_of(model)
        optimizer.step()
        optimizer.zero_grad()
    return results | {f"final {name}": full(p) for name, p in model.named_parameters()}


def optimizer_of(case: Case, model: nn.Module) -> torch.optim.Optimizer:
    name = "muon" if case.muon else "adamw"
    options = {"lr": 3e-3, "weight_decay": 0.1, "moments": case.moments}
    return build_optimizer(OptimizerConfig(name=name, **options), model)


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return {f"grad {name}": full(p.grad) for name, p in trained.items() if p.grad is not None}


def forward_backward(strategy: Strategy, model: nn.Module, case: Case) -> dict[str, Tensor]:
    """Run forward and backward over all microbatches; return the outputs and the auxiliary loss."""
    x, ids = batch_of(case)
    x = x.to(case.device)
    ids = [None if i is None else i.to(case.device) for i in ids]
    outputs = []
    auxiliary = torch.zeros((), dtype=torch.promote_types(case.dtype, torch.float32))
    auxiliary = auxiliary.to(case.device)
    for tokens in torch.arange(len(x), device=case.device).tensor_split(case.accumulation):
        local = share_of(tokens, case, *strategy.data)
        y, balances = model(x[local], [None if i is None else i[local] for i in ids])
        balances = [b._replace(counts=strategy.reduce(b.counts)) for b in balances]
        balance_loss = load_balancing_loss(balances, len(tokens), case.top_k)
        loss = balance_loss + z_loss(balances, len(tokens))
        share = loss * len(tokens) / len(x)
        ((y - 1).square().sum() / len(x) + 0.1 * share).backward()
        outputs.append(strategy.reduce(torch.zeros_like(x).index_copy(0, local, y.detach())))
        auxiliary += strategy.reduce(share)
    return {"y": torch.stack(outputs).sum(0), "auxiliary": auxiliary}


def train_on_rank(layout: Layout, cases: list[Case]) -> list[Any]:
    """Train in each case: return all results on rank 0, and the gradient norm on the others."""
    results = [train(layout, case) for case in cases]
    if dist.get_rank():
        return [result["norm"].item() for result in results]
    return [as_arrays(result) for result in results]


def as_arrays(tensors: Mapping[str, Tensor]) -> dict[str, np.ndarray[Any, Any]]:
    """Return float64 arrays, which pickle copies without torch's shared memory."""
    return {name: tensor.detach().double().cpu().numpy() for name, tensor in tensors.items()}


def arrays_on_rank(layout: Layout, case: Case) -> dict[str, np.ndarray[Any, Any]]:
    return as_arrays(train(layout, case))


def expert_numel(layout: Layout) -> int:
    """Return the numel of the expert parameters that a rank holds, with two experts a layer."""
    _, model = build(layout, Case(experts=2))
    experts = [p for name, p in model.named_parameters() if ".experts." in name]
    return sum(local_part(p).numel() for p in experts)
