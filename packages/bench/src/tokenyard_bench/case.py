"""The tensors of one measured layer; every contestant computes with the same ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from tokenyard import ConfigError, RoutingRule, Workload
from tokenyard.activations import up_rows
from tokenyard.errors import did_you_mean
from tokenyard_bench.shapes import Shape

RoutingKind = Literal["natural", "zipf", "uniform"]
ROUTINGS: tuple[RoutingKind, ...] = get_args(RoutingKind)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

_GUMBEL_STD = 1.2825  # of standard Gumbel noise: added to log popularities, its K largest are a popular sample


@dataclass(frozen=True)
class Case:
    """One layer's input, weights and incoming gradient; leaves that require grad."""

    workload: Workload
    x: Tensor  # [T, D]
    router: nn.Parameter  # [E, D]
    up: nn.Parameter  # [E, 2F or F, D]
    down: nn.Parameter  # [E, D, F]
    dy: Tensor  # [T, D]
    topk_ids: Tensor | None  # [T, K] in place of a selection, else None

    def leaves(self) -> list[Tensor]:
        """List what gradients are taken of."""
        return [self.x, self.router, self.up, self.down]


def make_case(
    shape: Shape,
    routing: RoutingKind,
    dtype: torch.dtype,
    device: torch.device,
    activation: str = "swiglu",
) -> Case:
    """Return fresh random tensors. Raises ConfigError for an impossible size.

    natural: the router of a new model, so near uniform. uniform: ids given, each expert equally often. zipf: the router
    prefers expert r (in a random order) with popularity 1/r, by a feature that all tokens share.
    """
    if routing not in ROUTINGS:
        known = ", ".join(ROUTINGS)
        raise ConfigError(
            f"--routing {routing!r} is unknown{did_you_mean(routing, ROUTINGS)}; known are: {known}"
        )
    _, tokens, dim, ffn_dim, experts, top_k = shape
    rule = RoutingRule(normalize=1.0)
    workload = Workload(
        dim, ffn_dim, experts, top_k, activation, router=rule, dtype=dtype, device=device
    )
    up = _normal((experts, up_rows(activation, ffn_dim), dim), dim**-0.5, workload)
    down = _normal((experts, dim, ffn_dim), ffn_dim**-0.5, workload)
    x, router = (
        _normal((tokens, dim), 1.0, workload),
        _normal((experts, dim), (3 * dim) ** -0.5, workload),
    )
    if routing == "zipf":
        _prefer(x, router)
    ids = _uniform_ids(shape, device) if routing == "uniform" else None
    dy = _normal((tokens, dim), 1.0, workload)
    return Case(
        workload,
        x.requires_grad_(),
        nn.Parameter(router),
        nn.Parameter(up),
        nn.Parameter(down),
        dy,
        ids,
    )


def busiest(topk_ids: Tensor, num_experts: int) -> float:
    """Return the busiest expert's slots as a multiple of the mean."""
    counts = torch.bincount(topk_ids.flatten().long(), minlength=num_experts)[:num_experts].double()
    return (counts.max() / counts.mean()).item()


def _normal(shape: tuple[int, ...], std: float, workload: Workload) -> Tensor:
    return torch.randn(shape, device=workload.device, dtype=workload.dtype).mul_(std)


def _prefer(x: Tensor, router: Tensor) -> None:
    experts, dim = router.shape
    ranks = torch.randperm(experts, device=router.device) + 1
    router.normal_(std=_GUMBEL_STD * dim**-0.5)
    router[:, 0] = -ranks.double().log().to(router.dtype)
    x[:, 0] = 1


def _uniform_ids(shape: Shape, device: torch.device) -> Tensor:
    slots = (
        torch.arange(shape.slots, device=device).view(shape.tokens, shape.top_k) % shape.num_experts
    )
    return slots[torch.randperm(shape.tokens, device=device)].int()
