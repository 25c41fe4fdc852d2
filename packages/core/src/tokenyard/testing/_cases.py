"""The inputs that expert kernels are tried on, and how they are called."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from tokenyard.activations import up_rows
from tokenyard.interfaces import ExpertWeights, Plan, logits_dtype
from tokenyard.permutations import TorchPermutation
from tokenyard.workload import Workload

ROUTINGS = ("natural", "all to one expert", "empty experts", "some dropped", "all dropped")
"""The names of `routings`."""


@dataclass(frozen=True)
class Case:
    """One call of an expert kernel: tensors that require grad, and the gradient that comes back."""

    workload: Workload
    ids: Tensor  # [T, K]
    tensors: dict[str, Tensor] = field(
        default_factory=dict
    )  # x, topk_weights and the ExpertWeights' fields
    dy: Tensor = field(default_factory=lambda: torch.empty(0))

    def weights(self) -> ExpertWeights:
        """Return the experts' weights among the tensors."""
        return _expert_weights(self.tensors)

    def to(self, dtype: torch.dtype) -> Case:
        """Return the same case in another dtype, with fresh leaves."""
        tensors = {
            n: t.detach().to(dtype).requires_grad_(t.requires_grad) for n, t in self.tensors.items()
        }
        return replace(self, tensors=tensors, dy=self.dy.to(dtype))


class Call:
    """A kernel together with the plan it needs, callable on a case."""

    def __init__(self, kernel: Any, permutation: TorchPermutation, workload: Workload):
        self.kernel, self.permutation, self.num_experts = kernel, permutation, workload.num_experts

    def __call__(self, case: Case, rows: int | None = None) -> Tensor:
        return self.call(case.tensors, case.ids, rows)

    def call(self, tensors: dict[str, Tensor], ids: Tensor, rows: int | None = None) -> Tensor:
        plan: Plan = self.permutation.plan(ids, self.num_experts, rows)
        return self.kernel(
            tensors["x"], plan, tensors.get("topk_weights"), _expert_weights(tensors)
        )


def _expert_weights(tensors: dict[str, Tensor]) -> ExpertWeights:
    return ExpertWeights(*(tensors.get(name) for name in ExpertWeights._fields))  # type: ignore[arg-type]


def make_case(workload: Workload, ids: Tensor) -> Case:
    """Return fresh random tensors of the workload's dtype and device for routing ids [T, K]."""
    wide = logits_dtype(workload.dtype)
    rows = up_rows(workload.activation, workload.ffn_dim)
    experts, dim, ffn_dim = workload.num_experts, workload.dim, workload.ffn_dim
    shapes: dict[str, Any] = {"up": (experts, rows, dim), "down": (experts, dim, ffn_dim)}
    if workload.bias:
        shapes |= {"up_bias": (experts, rows), "down_bias": (experts, dim)}
    kind: dict[str, Any] = {"device": workload.device, "dtype": workload.dtype}
    tensors = {"x": torch.randn(ids.shape[0], dim, **kind)}
    tensors["topk_weights"] = torch.rand(ids.shape, device=workload.device, dtype=wide) + 0.1
    tensors |= {
        name: torch.randn(shape, **kind) * shape[-1] ** -0.5 for name, shape in shapes.items()
    }
    for tensor in tensors.values():
        tensor.requires_grad_()
    return Case(workload, ids.to(workload.device), tensors, torch.randn(ids.shape[0], dim, **kind))


def random_ids(tokens: int, num_experts: int, top_k: int) -> Tensor:
    """Return [T, K] int32 ids, distinct within a token."""
    if tokens == 0:
        return torch.empty(0, top_k, dtype=torch.int32)
    return torch.rand(tokens, num_experts).argsort(-1)[:, :top_k].int()


def routings(tokens: int, num_experts: int, top_k: int) -> dict[str, Tensor]:
    """Return the routings that go wrong first, by name; E marks a dropped slot."""
    ids = random_ids(tokens, num_experts, top_k)
    some_dropped = torch.where(torch.rand(ids.shape) < 0.4, num_experts, ids).int()
    some_dropped[0] = num_experts  # a token without any expert
    return {
        "natural": ids,
        "all to one expert": torch.cat(
            (torch.full((tokens, 1), 1), torch.full((tokens, top_k - 1), num_experts)), 1
        ).int(),
        "empty experts": torch.where(ids % 2 == 0, ids, ids - 1).int(),
        "some dropped": some_dropped,
        "all dropped": torch.full_like(ids, num_experts + 2),
    }
