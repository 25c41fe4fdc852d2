"""The tensors of one measured layer. All entrants compute with the same ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from tokenyard import RoutingRule, Workload
from tokenyard.activations import up_rows
from tokenyard.errors import one_of
from tokenyard_bench.shapes import Shape

RoutingKind = Literal["natural", "zipf", "uniform"]
ROUTINGS: tuple[RoutingKind, ...] = get_args(RoutingKind)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

# Standard deviation of standard Gumbel noise. The top K of (log popularity + Gumbel noise) are a
# sample by popularity.
_GUMBEL_STD = 1.2825


@dataclass(frozen=True)
class Case:
    """Input, weights and output gradient of one layer. All but the last are leaves with grad."""

    workload: Workload
    x: Tensor  # [T, D]
    router: nn.Parameter  # [E, D]
    up: nn.Parameter  # [E, 2F or F, D]
    down: nn.Parameter  # [E, D, F]
    dy: Tensor  # [T, D]
    topk_ids: Tensor | None  # [T, K]: overrides the router's selection
    topk_weights: Tensor | None = None  # [T, K]: overrides the router's weights

    def leaves(self) -> list[Tensor]:
        """Return the tensors whose gradients are computed."""
        return [self.x, self.router, self.up, self.down]

    @property
    def slots(self) -> int:
        """Number of (token, expert) pairs, T*K."""
        return self.x.shape[0] * self.workload.top_k


def make_case(
    shape: Shape,
    routing: RoutingKind,
    dtype: torch.dtype,
    device: torch.device,
    activation: str = "swiglu",
) -> Case:
    """Return new random tensors. Raises ConfigError for an impossible size.

    natural: the router of an untrained model, nearly uniform. uniform: fixed ids, each expert
    equally often. zipf: the router prefers the expert of (random) rank r with popularity 1/r,
    through a feature that all tokens share.
    """
    one_of("--routing", routing, ROUTINGS)
    rule = RoutingRule(normalize=1.0)
    size = (shape.dim, shape.ffn_dim, shape.num_experts, shape.top_k)
    workload = Workload(*size, activation, router=rule, dtype=dtype, device=device)
    dim = shape.dim
    experts = shape.num_experts
    up = _normal((experts, up_rows(activation, shape.ffn_dim), dim), dim**-0.5, workload)
    down = _normal((experts, dim, shape.ffn_dim), shape.ffn_dim**-0.5, workload)
    x = _normal((shape.tokens, dim), 1.0, workload)
    router = _normal((experts, dim), (3 * dim) ** -0.5, workload)
    if routing == "zipf":
        _prefer(x, router)
    ids = _uniform_ids(shape, device) if routing == "uniform" else None
    dy = _normal((shape.tokens, dim), 1.0, workload)
    return Case(
        workload=workload,
        x=x.requires_grad_(),
        router=nn.Parameter(router),
        up=nn.Parameter(up),
        down=nn.Parameter(down),
        dy=dy,
        topk_ids=ids,
    )


def busiest(topk_ids: Tensor, num_experts: int) -> float:
    """Return the slots of the busiest expert as a multiple of the mean."""
    counts = torch.bincount(topk_ids.flatten().long(), minlength=num_experts)[:num_experts].double()
    return (counts.max() / counts.mean()).item()


def _normal(shape: tuple[int, ...], std: float, workload: Workload) -> Tensor:
    return torch.randn(shape, device=workload.device, dtype=workload.dtype).mul_(std)


def _prefer(x: Tensor, router: Tensor) -> None:
    """Overwrite the router [E, D] and one feature of x [T, D] for zipf routing."""
    experts, dim = router.shape
    ranks = torch.randperm(experts, device=router.device) + 1
    router.normal_(std=_GUMBEL_STD * dim**-0.5)
    router[:, 0] = -ranks.double().log().to(router.dtype)
    x[:, 0] = 1


def _uniform_ids(shape: Shape, device: torch.device) -> Tensor:
    """Return ids [T, K] in which all experts are equally frequent."""
    slots = torch.arange(shape.slots, device=device).view(shape.tokens, shape.top_k)
    return (slots % shape.num_experts)[torch.randperm(shape.tokens, device=device)].int()
