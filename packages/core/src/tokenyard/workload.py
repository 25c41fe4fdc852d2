"""What a backend is asked to compute, so that it can say whether it is usable."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from tokenyard.activations import ACTIVATIONS
from tokenyard.devices import with_index
from tokenyard.errors import BackendError, ConfigError, one_of
from tokenyard.numerics import compute_dtype


def _indivisible(what: str, value: int, experts: int) -> str:
    divisors = ", ".join(str(d) for d in range(1, experts + 1) if experts % d == 0)
    return f"{what} is {value}, which does not divide num_experts {experts}; these do: {divisors}"


@dataclass(frozen=True)
class RoutingRule:
    """How tokens choose experts; what is computed, not who computes it.

    Scores are a softmax or sigmoid of the logits. Selection takes the K highest scores (plus the selection bias, if
    there is one), equal ones lowest id first. Weights are the chosen scores, without the bias, normalised and scaled.
    """

    algorithm: str = "topk"
    score: Literal["softmax", "sigmoid"] = "softmax"
    select_first: bool = False  # take the softmax over the K selected logits only
    normalize: float | None = None  # divide a token's K weights by their p-norm; this is p
    scale: float = 1.0  # multiply the weights last (DeepSeek-V3's routed_scaling_factor)
    jitter: float = (
        0.0  # while training, multiply the router's input by uniform [1 - jitter, 1 + jitter]
    )
    bias_update_rate: float = (
        0.0  # above 0: a selection bias, moved so after each step (arXiv 2408.15664)
    )
    num_groups: int = 1  # experts stand in groups of E / num_groups
    groups_kept: int = 1  # and a token may choose from its best groups only (arXiv 2412.19437)
    group_score: Literal["max", "top2"] = (
        "max"  # a group's score: its best expert, or the sum of its best two
    )
    capacity_factor: float | None = (
        None  # an expert keeps int(factor * K * T / E) slots, the first ones
    )
    options: Mapping[str, Any] = field(
        default_factory=dict, hash=False
    )  # for algorithms of plugins

    def __post_init__(self) -> None:
        one_of("router score", self.score, ("softmax", "sigmoid"))
        one_of("router group_score", self.group_score, ("max", "top2"))
        if self.select_first and self.score != "softmax":
            raise ConfigError("router select_first goes with score 'softmax', not 'sigmoid'")
        if not 0 <= self.jitter < 1:
            raise ConfigError(f"router jitter is {self.jitter}; it must be at least 0 and below 1")
        for name in ("bias_update_rate", "scale"):
            if getattr(self, name) < 0:
                raise ConfigError(
                    f"router {name} is {getattr(self, name)}; it must not be negative"
                )
        for name in ("normalize", "capacity_factor"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ConfigError(
                    f"router {name} is {value}; give a finite number above 0, or leave it out"
                )
        groups, kept = self.num_groups, self.groups_kept
        if not 1 <= kept <= groups:
            raise ConfigError(
                f"router groups_kept is {kept}; choose from 1 to num_groups, {groups}"
            )


@dataclass(frozen=True)
class Workload:
    """One MoE layer's size and numerics, and where it runs. Raises ConfigError for an impossible one."""

    dim: int  # D
    ffn_dim: int  # F
    num_experts: int  # E, over all ranks
    top_k: int  # K
    activation: str = "swiglu"
    bias: bool = False  # up_bias and down_bias in every expert
    router: RoutingRule = RoutingRule()
    dtype: torch.dtype = torch.float32  # what the experts compute in
    device: torch.device = field(
        default_factory=lambda: torch.device("cpu")
    )  # a GPU's always has an index
    capability: tuple[int, int] | None = (
        None  # the CUDA compute capability; asked of the device if not given
    )
    expert_parallel: int = 1  # ranks that share the experts

    def __post_init__(self) -> None:
        for name in ("dim", "ffn_dim", "num_experts", "top_k", "expert_parallel"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1")
        one_of("activation", self.activation, ACTIVATIONS)
        experts, groups = self.num_experts, self.router.num_groups
        if self.top_k > experts:
            raise ConfigError(
                f"top_k is {self.top_k} but num_experts is {experts}; choose top_k from 1 to {experts}"
            )
        if experts % self.expert_parallel:
            raise ConfigError(_indivisible("expert_parallel", self.expert_parallel, experts))
        if experts % groups:
            raise ConfigError(_indivisible("router num_groups", groups, experts))
        if self.top_k > experts // groups * self.router.groups_kept:
            kept = experts // groups * self.router.groups_kept
            raise ConfigError(
                f"top_k is {self.top_k} but the groups kept hold {kept} experts; keep more groups"
            )
        if self.router.group_score == "top2" and groups > 1 and experts // groups < 2:
            raise ConfigError(
                f"router group_score 'top2' needs 2 experts in a group; num_groups {groups} leaves one"
            )
        object.__setattr__(self, "device", with_index(self.device))
        if self.capability is None and self.device.type == "cuda" and torch.cuda.is_available():
            object.__setattr__(self, "capability", torch.cuda.get_device_capability(self.device))

    def check_input(self, x: Tensor) -> None:
        """Raise BackendError if tokens x would be computed in another dtype or on another device than this one's.

        Backends are chosen for one dtype and one device, and need not support any other. On the meta device, where
        nothing is computed, every dtype and device is accepted.
        """
        if x.device.type == "meta":
            return
        dtype = compute_dtype(x)
        if dtype == self.dtype and x.device == self.device:
            return
        raise BackendError(
            f"the MoE layer's backends were chosen for {_short(self.dtype)} on {self.device}, but x would be "
            f"computed in {_short(dtype)} on {x.device}; move or cast x, use autocast, or build the layer for that"
        )


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
