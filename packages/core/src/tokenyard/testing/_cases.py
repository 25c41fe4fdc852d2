"""Test cases of expert kernels: routings, tensors and the call of a kernel."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from tokenyard.activations import swiglu_options, up_rows
from tokenyard.interfaces import ExpertWeights, GradientSums, Plan, logits_dtype
from tokenyard.permutations import TorchPermutation
from tokenyard.workload import Workload

ROUTINGS = ("natural", "all to one expert", "empty experts", "some dropped", "all dropped")
"""The keys of `routings`."""


@dataclass(frozen=True)
class Case:
    """The inputs of an expert kernel, which require grad, and the gradient of its output."""

    workload: Workload
    ids: Tensor  # [T, K]
    # by name: x, topk_weights and the fields of ExpertWeights
    tensors: dict[str, Tensor] = field(default_factory=dict)
    dy: Tensor = field(default_factory=lambda: torch.empty(0))  # [T, D]

    def weights(self) -> ExpertWeights:
        """Return the expert weights."""
        return _expert_weights(self.tensors)

    def to(self, dtype: torch.dtype) -> Case:
        """Return a copy in another dtype, whose tensors are leaves."""
        tensors = {
            name: tensor.detach().to(dtype).requires_grad_(tensor.requires_grad)
            for name, tensor in self.tensors.items()
        }
        return replace(self, tensors=tensors, dy=self.dy.to(dtype))


class Call:
    """A kernel that can be called on a case: it makes the plan itself."""

    def __init__(self, kernel: Any, permutation: TorchPermutation, workload: Workload):
        self.kernel = kernel
        self.permutation = permutation
        self.num_experts = workload.num_experts

    def __call__(self, case: Case, rows: int | None = None) -> Tensor:
        return self.call(case.tensors, case.ids, rows)

    def call(self, tensors: dict[str, Tensor], ids: Tensor, rows: int | None = None) -> Tensor:
        plan: Plan = self.permutation.plan(ids, self.num_experts, rows)
        weights = _expert_weights(tensors)
        return self.kernel(tensors["x"], plan, tensors.get("topk_weights"), weights)

    def with_sums(self, tensors: dict[str, Tensor], ids: Tensor, sums: GradientSums) -> Tensor:
        plan: Plan = self.permutation.plan(ids, self.num_experts)
        weights = _expert_weights(tensors)
        y: Tensor = self.kernel.with_sums(
            tensors["x"], plan, tensors.get("topk_weights"), weights, sums
        )
        return y


def _expert_weights(tensors: dict[str, Tensor]) -> ExpertWeights:
    biases = {name: tensors.get(name) for name in ("up_bias", "down_bias")}
    return ExpertWeights(tensors["up"], tensors["down"], **biases)


def make_case(workload: Workload, ids: Tensor) -> Case:
    """Return a case of random tensors in the workload's dtype, on its device, for ids [T, K]."""
    experts = workload.num_experts
    dim = workload.dim
    rows = up_rows(workload.activation, workload.ffn_dim)
    shapes = {"up": (experts, rows, dim), "down": (experts, dim, workload.ffn_dim)}
    biases = {"up_bias": (experts, rows), "down_bias": (experts, dim)} if workload.bias else {}
    wide = logits_dtype(workload.dtype)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, device=workload.device, dtype=workload.dtype)

    tensors = {"x": randn(ids.shape[0], dim)}
    tensors["topk_weights"] = torch.rand(ids.shape, device=workload.device, dtype=wide) + 0.1
    for name, shape in (shapes | biases).items():
        tensors[name] = randn(*shape) * shape[-1] ** -0.5
    for tensor in tensors.values():
        tensor.requires_grad_()
    return Case(workload, ids.to(workload.device), tensors, randn(ids.shape[0], dim))


@torch.no_grad()
def keep_off_limit(case: Case) -> None:
    """Draw tokens again until rounding cannot move a pre-activation over the limit of SwiGLU.

    The gradient jumps there, so two right kernels would differ. No slot of the case is dropped.
    """
    while "limit" in case.workload.activation and (near := _near_limit(case)).any():
        x = case.tensors["x"]
        x[near] = torch.randn_like(x[near])


def _near_limit(case: Case) -> Tensor:
    """Return [T] bool: the tokens with a pre-activation near the limit."""
    limit = swiglu_options(case.workload.activation).limit
    tensors = {name: tensor.detach().double() for name, tensor in case.tensors.items()}
    ids = case.ids.long()
    z = torch.einsum("td,tkfd->tkf", tensors["x"], tensors["up"][ids])  # [T, K, 2F]
    if "up_bias" in tensors:
        z = z + tensors["up_bias"][ids]
    gate, up = z.chunk(2, -1)
    distance = torch.minimum((gate - limit).abs(), (up.abs() - limit).abs())
    return (distance < limit * 2**-8).flatten(1).any(1)  # the rounding of bfloat16


def random_ids(tokens: int, num_experts: int, top_k: int) -> Tensor:
    """Return random ids [T, K] int32, distinct for each token."""
    if tokens == 0:
        return torch.empty(0, top_k, dtype=torch.int32)
    return torch.rand(tokens, num_experts).argsort(-1)[:, :top_k].int()


def routings(tokens: int, num_experts: int, top_k: int) -> dict[str, Tensor]:
    """Return name -> ids [T, K] for edge cases of routing. An id >= E is a dropped slot."""
    ids = random_ids(tokens, num_experts, top_k)
    some_dropped = torch.where(torch.rand(ids.shape) < 0.4, num_experts, ids).int()
    some_dropped[0] = num_experts  # a token without any expert
    one_expert = torch.full((tokens, top_k), num_experts, dtype=torch.int32)
    one_expert[:, 0] = 1
    return {
        "natural": ids,
        "all to one expert": one_expert,
        "empty experts": torch.where(ids % 2 == 0, ids, ids - 1).int(),
        "some dropped": some_dropped,
        "all dropped": torch.full_like(ids, num_experts + 2),
    }
