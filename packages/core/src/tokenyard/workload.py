"""The description of an MoE layer that decides which backends are usable."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from tokenyard.activations import check_activation
from tokenyard.devices import with_index
from tokenyard.divisors import divisors
from tokenyard.dtypes import compute_dtype
from tokenyard.errors import BackendError, ConfigError, one_of


def _indivisible(what: str, value: int, experts: int) -> str:
    choices = ", ".join(map(str, divisors(experts)))
    return f"{what} is {value}, which does not divide num_experts {experts}; these do: {choices}"


@dataclass(frozen=True)
class RoutingRule:
    """How a router chooses experts for a token; independent of the router backend.

    Scores are the softmax or sigmoid of the logits. The router selects the K highest scores, plus
    the selection bias if there is one. Equal scores are selected lowest id first. Weights are the
    selected scores without the bias, normalised and scaled. Raises ConfigError for invalid values.
    """

    # or expert_choice, sinkhorn, token_rounding, or that of a router of a plugin
    algorithm: str = "topk"
    score: Literal["softmax", "sigmoid"] = "softmax"  # of the logits
    select_first: bool = False  # take the softmax over the K selected logits only
    normalize: float | None = None  # p: divide the K weights of a token by their p-norm
    scale: float = 1.0  # factor of the final weights (DeepSeek-V3's routed_scaling_factor)
    # while training, multiply the router's input by uniform [1 - jitter, 1 + jitter]
    jitter: float = 0.0
    # above 0: update a selection bias by this much after each step (arXiv 2408.15664)
    bias_update_rate: float = 0.0
    num_groups: int = 1  # split the experts into this many groups of equal size
    groups_kept: int = 1  # a token selects experts from its best groups only (arXiv 2412.19437)
    # the score of a group: its highest score, or the sum of its two highest
    group_score: Literal["max", "top2"] = "max"
    # each expert keeps its first int(factor * K * T / E) slots and drops the others;
    # where that is 0, none is dropped
    capacity_factor: float | None = None
    # options of an algorithm other than topk, by name
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if self.options and self.algorithm == "topk":
            raise ConfigError(
                f"router options {dict(self.options)} are for other algorithms than 'topk'; "
                "leave them out, or name another algorithm"
            )
        one_of("router score", self.score, ("softmax", "sigmoid"))
        one_of("router group_score", self.group_score, ("max", "top2"))
        if self.select_first and self.score != "softmax":
            raise ConfigError("router select_first goes with score 'softmax', not 'sigmoid'")
        if not 0 <= self.jitter < 1:
            raise ConfigError(f"router jitter is {self.jitter}; it must be at least 0 and below 1")
        for name in ("bias_update_rate", "scale"):
            value = getattr(self, name)
            if value < 0:
                raise ConfigError(f"router {name} is {value}; it must not be negative")
        for name in ("normalize", "capacity_factor"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ConfigError(
                    f"router {name} is {value}; give a finite number above 0, or leave it out"
                )
        if not 1 <= self.groups_kept <= self.num_groups:
            raise ConfigError(
                f"router groups_kept is {self.groups_kept}; "
                f"choose from 1 to num_groups, {self.num_groups}"
            )


@dataclass(frozen=True)
class Workload:
    """The sizes, dtype and device of one MoE layer, from which backends are chosen.

    Raises ConfigError for sizes that cannot be combined.
    """

    dim: int  # D
    ffn_dim: int  # F
    num_experts: int  # E, over all ranks
    top_k: int  # K
    activation: str = "swiglu"  # one of `ACTIVATIONS`, or `swiglu` with options
    bias: bool = False  # up_bias and down_bias in every expert
    router: RoutingRule = RoutingRule()  # how experts are selected
    dtype: torch.dtype = torch.float32  # compute dtype of the experts
    # a GPU always has an index
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    # CUDA compute capability, by default that of the device
    capability: tuple[int, int] | None = None
    expert_parallel: int = 1  # number of ranks that share the experts
    # the width of each expert, if they differ; ffn_dim is the largest. Weights have the shape for
    # ffn_dim: what lies past an expert's width is not used and has a zero gradient
    ffn_dims: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        check_activation(self.activation)
        self._check_sizes()
        self._check_groups()
        self._check_widths()
        object.__setattr__(self, "device", with_index(self.device))
        if self.capability is None and self.device.type == "cuda" and torch.cuda.is_available():
            object.__setattr__(self, "capability", torch.cuda.get_device_capability(self.device))

    @property
    def ranks_per_token(self) -> float:
        """The mean number of ranks that hold some of a token's experts, if routing is uniform."""
        ranks = self.expert_parallel
        elsewhere = self.num_experts - self.num_experts // ranks
        unused = math.comb(elsewhere, self.top_k) / math.comb(self.num_experts, self.top_k)
        return ranks * (1 - unused)

    def check_input(self, x: Tensor) -> None:
        """Raise BackendError if x [T, D] would be computed in another dtype or on another device.

        Backends are chosen for one dtype and one device, and may not support any other. Accepts
        any x on the meta device, where nothing is computed.
        """
        if x.device.type == "meta":
            return
        dtype = compute_dtype(x)
        if dtype == self.dtype and x.device == self.device:
            return
        raise BackendError(
            f"the MoE layer's backends were chosen for {_short(self.dtype)} on {self.device}, "
            f"but x would be computed in {_short(dtype)} on {x.device}; "
            "move or cast x, use autocast, or build the layer for that"
        )

    def _check_sizes(self) -> None:
        for name in ("dim", "ffn_dim", "num_experts", "top_k", "expert_parallel"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1")
        experts = self.num_experts
        if self.top_k > experts:
            raise ConfigError(
                f"top_k is {self.top_k} but num_experts is {experts}; "
                f"choose top_k from 1 to {experts}"
            )
        if experts % self.expert_parallel:
            raise ConfigError(_indivisible("expert_parallel", self.expert_parallel, experts))

    def _check_widths(self) -> None:
        widths = self.ffn_dims
        if widths is None:
            return
        if len(widths) != self.num_experts or min(widths) < 1 or max(widths) != self.ffn_dim:
            raise ConfigError(
                f"ffn_dims is {list(widths)}; give {self.num_experts} widths, one for each expert, "
                f"of which the largest is ffn_dim, {self.ffn_dim}"
            )
        if self.expert_parallel > 1:
            raise ConfigError(
                f"ffn_dims goes with experts on one rank, and expert_parallel is "
                f"{self.expert_parallel}; set it to 1"
            )

    def _check_groups(self) -> None:
        groups = self.router.num_groups
        if self.num_experts % groups:
            raise ConfigError(_indivisible("router num_groups", groups, self.num_experts))
        group_size = self.num_experts // groups
        kept = group_size * self.router.groups_kept
        if self.top_k > kept:
            raise ConfigError(
                f"top_k is {self.top_k} but the groups kept hold {kept} experts; keep more groups"
            )
        if self.router.group_score == "top2" and groups > 1 and group_size < 2:
            raise ConfigError(
                "router group_score 'top2' needs 2 experts in a group; "
                f"num_groups {groups} leaves one"
            )


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
