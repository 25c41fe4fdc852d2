"""Read the `ffn_config` section that DBRX and LLM Foundry's MPT share.

The keys are MegaBlocks', and ours for what MegaBlocks does not have.
"""

from __future__ import annotations

import functools
import logging
from typing import Any, ClassVar, Literal

from pydantic import Field

from tokenyard import AuxiliaryLoss, ConfigError, RoutingRule
from tokenyard_models.config import MoEConfig, check_top_k
from tokenyard_models.strict_config import Strict

_GATED = {("silu", "none"): "swiglu", ("gelu", "none"): "geglu", ("relu", "none"): "reglu"}
_POINTWISE = {
    ("gelu", "none"): "gelu",
    ("gelu", "tanh"): "gelu_tanh",
    ("gelu_tanh", "none"): "gelu_tanh",
    ("silu", "none"): "silu",
    ("relu", "none"): "relu",
    ("relu_squared", "none"): "relu_squared",
}
_EXPERT_KEYS = ("moe_", "shared_expert", "uniform_expert", "dense_layers")


log = logging.getLogger("tokenyard")

FfnType = Literal["mptmlp", "mptglu", "mb_dmoe", "mb_moe", "torch_dmoe"]


class ActivationName(Strict):
    """An activation by its name in torch.nn.functional. A gated layer makes SwiGLU of silu."""

    name: Literal["silu", "gelu", "relu", "gelu_tanh", "relu_squared"]  # the function
    approximate: Literal["none", "tanh"] = "none"  # approximation of gelu


class FfnConfig(Strict):
    """A feed-forward layer: dense (mptmlp, mptglu) or with experts.

    Experts are dropless (mb_dmoe, torch_dmoe) or have a capacity (mb_moe).
    """

    ignored: ClassVar[frozenset[str]] = frozenset(
        [
            "mlp_impl",
            "memory_optimized_mlp",
            "moe_lbl_in_fp32",
            "moe_zloss_in_fp32",
            "lbl_process_group",
            "fp16",
            "bf16",
            "fc_type",
            "fc_cls",
            "fc_kwargs",
            "remat_act_fn",
            "return_bias",
            "device_mesh",
            "num_layers",
            "moe_expert_model_parallelism",
            "expert_parallel_group",
            "init_method",
            "output_layer_init_method",
        ]
    )

    ffn_type: FfnType = "mptmlp"  # dense (mptmlp, mptglu) or with experts; mb_moe has a capacity
    ffn_hidden_size: int | None = Field(None, ge=1)  # F
    ffn_act_fn: ActivationName | None = None
    mlp_type: Literal["mlp", "glu"] = "mlp"  # glu: gated
    moe_num_experts: int = Field(1, ge=1)  # E
    moe_top_k: int = Field(1, ge=1)  # K
    moe_ffn_hidden_sizes: list[int] | None = (
        None  # width of each expert if they differ, in multiples of 64; the largest is F
    )
    moe_world_size: int | None = Field(None, ge=1)  # expert-parallel ranks
    moe_loss_weight: float = Field(0.1, ge=0)  # weight of the load-balancing loss
    moe_zloss_weight: float = Field(0.0, ge=0)  # weight of the z-loss
    moe_loss_convention: Literal["megablocks", "hf"] = (
        "megablocks"  # scale of the load-balancing loss
    )
    moe_jitter_eps: float | None = Field(
        None,  # in training, the router's input is multiplied by uniform [1 - eps, 1 + eps]
        ge=0,
        lt=1,
    )
    moe_normalize_expert_weights: float | None = Field(
        None,  # divide a token's K routing weights by their p-norm; this is p
        gt=0,
    )
    moe_capacity_factor: float = Field(1.0, ge=0)  # capacity of mb_moe; 0 drops nothing
    uniform_expert_assignment: bool = False  # slots take experts in turn, for benchmarks
    shared_expert: bool = False  # add one expert that computes all tokens
    shared_expert_hidden_size: int | None = Field(None, ge=1)  # its width; default: F
    shared_expert_weighted_sum: bool = False  # weights K / (K + 1) and, for it, 1 / (K + 1)
    moe_score_function: Literal["softmax", "sigmoid"] = "softmax"  # scores from router logits
    moe_select_first: bool = False  # softmax over the K selected logits only
    moe_weight_scale: float = Field(1.0, gt=0)  # multiplies the routing weights last
    moe_bias_update_rate: float = Field(0.0, ge=0)  # step of the selection bias; 0: no bias
    moe_num_groups: int = Field(1, ge=1)  # number of expert groups
    moe_groups_kept: int = Field(1, ge=1)  # best groups that a token chooses experts from
    moe_group_score: Literal["max", "top2"] = "max"  # a group's best expert, or sum of best two
    moe_router_algorithm: str = "topk"  # how experts are selected; see the page Routing
    moe_router_options: dict[str, Any] = {}  # options of an algorithm other than topk
    dense_layers: list[int] = []  # numbers of dense layers, from 0

    @property
    def has_experts(self) -> bool:
        """Return whether the layers are MoE layers."""
        return self.ffn_type in ("mb_dmoe", "mb_moe", "torch_dmoe")

    def activation(self) -> str:
        """Return core's name of the activation. Raises ConfigError if core has none.

        The default is GELU, in its tanh form for MegaBlocks' experts that are not gated (as there).
        """
        gated = self.ffn_type == "mptglu" or (self.has_experts and self.mlp_type == "glu")
        megablocks = self.ffn_type in ("mb_dmoe", "mb_moe")
        approximate: Literal["none", "tanh"] = "tanh" if megablocks and not gated else "none"
        if self.ffn_act_fn is None and megablocks and gated:
            _warn_of_exact_gelu()
        activation = self.ffn_act_fn or ActivationName(name="gelu", approximate=approximate)
        known = _GATED if gated else _POINTWISE
        key = (activation.name, activation.approximate)
        if key not in known:
            names = ", ".join(
                name if form == "none" else f"{name} ({form})" for name, form in known
            )
            kind = "gated" if gated else "plain"
            raise ConfigError(
                f"model.ffn_config.ffn_act_fn is {activation.name!r} with approximate "
                f"{activation.approximate!r}, which has no {kind} form; these have: {names}"
            )
        return known[key]

    def moe(self, ffn_dim: int, bias: bool = False) -> MoEConfig | None:
        """Return the MoE layers, or None for a dense model.

        `bias` adds MegaBlocks' single output bias. Raises ConfigError for contradicting keys.
        """
        self._check_agreement()
        if not self.has_experts:
            return None
        shared_dim = (self.shared_expert_hidden_size or ffn_dim) if self.shared_expert else None
        return MoEConfig(
            ffn_dim,
            self.moe_num_experts,
            self.moe_top_k,
            ffn_dims=self._widths(ffn_dim),
            activation=self.activation(),
            output_bias=bias,
            rule=self.rule(),
            shared_dim=shared_dim,
            shared_weighted_sum=self.shared_expert_weighted_sum,
            forced_balance=self.uniform_expert_assignment,
        )

    def _check_agreement(self) -> None:
        check_top_k(
            "model.ffn_config.moe_top_k", self.moe_top_k, "moe_num_experts", self.moe_num_experts
        )
        expert_keys = sorted(key for key in self.model_fields_set if key.startswith(_EXPERT_KEYS))
        if expert_keys and not self.has_experts:
            raise ConfigError(
                f"model.ffn_config.{expert_keys[0]} is for experts, but ffn_type is "
                f"{self.ffn_type!r}; set ffn_type: mb_dmoe, or drop the key"
            )
        if self.shared_expert_hidden_size is not None and not self.shared_expert:
            raise ConfigError(
                "model.ffn_config.shared_expert_hidden_size is given, but shared_expert is false; "
                "set shared_expert: true, or drop the key"
            )

    def _widths(self, ffn_dim: int) -> tuple[int, ...] | None:
        widths = self.moe_ffn_hidden_sizes
        if widths is None:
            return None
        experts = self.moe_num_experts
        if len(widths) != experts or min(widths) < 1 or max(widths) != ffn_dim:
            raise ConfigError(
                f"model.ffn_config.moe_ffn_hidden_sizes is {widths}; give {experts} widths, one "
                f"for each expert, of which the largest is ffn_hidden_size, {ffn_dim}"
            )
        return tuple(widths)

    def rule(self) -> RoutingRule:
        """Return the routing rule."""
        return RoutingRule(
            self.moe_router_algorithm,
            score=self.moe_score_function,
            select_first=self.moe_select_first,
            normalize=self.moe_normalize_expert_weights,
            scale=self.moe_weight_scale,
            jitter=self.moe_jitter_eps or 0.0,
            bias_update_rate=self.moe_bias_update_rate,
            num_groups=self.moe_num_groups,
            groups_kept=self.moe_groups_kept,
            group_score=self.moe_group_score,
            capacity_factor=self.moe_capacity_factor or None if self.ffn_type == "mb_moe" else None,
            options=self.moe_router_options,
        )

    def auxiliary(self) -> AuxiliaryLoss:
        """Return the routers' losses."""
        return AuxiliaryLoss(self.moe_loss_weight, self.moe_zloss_weight, self.moe_loss_convention)


@functools.cache
def _warn_of_exact_gelu() -> None:
    """Log once that the default of gated experts is not MegaBlocks'."""
    log.warning(
        "model.ffn_config.ffn_act_fn is not set: gated experts have exact GELU here, and its tanh "
        "form in MegaBlocks; set ffn_act_fn to choose silu, gelu or relu"
    )
