"""The `ffn_config` that DBRX and LLM Foundry's MPT share: MegaBlocks' key names, and ours for what it did not have."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field

from tokenyard import AuxiliaryLoss, ConfigError, RoutingRule
from tokenyard_models.config import MoEConfig, check_top_k
from tokenyard_models.schema import Strict

_GATED = {("silu", "none"): "swiglu", ("gelu", "none"): "geglu", ("relu", "none"): "reglu"}
_POINTWISE = {
    ("gelu", "none"): "gelu",
    ("gelu", "tanh"): "gelu_tanh",
    ("gelu_tanh", "none"): "gelu_tanh",
    ("silu", "none"): "silu",
    ("relu", "none"): "relu",
    ("relu_squared", "none"): "relu_squared",
}
_OF_EXPERTS = ("moe_", "shared_expert", "uniform_expert", "dense_layers")


FfnType = Literal["mptmlp", "mptglu", "mb_dmoe", "mb_moe", "torch_dmoe"]


class ActivationName(Strict):
    """An activation by its name in torch.nn.functional; gated when the layer is (silu becomes SwiGLU)."""

    name: Literal["silu", "gelu", "relu", "gelu_tanh", "relu_squared"]  # the function
    approximate: Literal["none", "tanh"] = "none"  # of gelu


class FfnConfig(Strict):
    """A feed-forward layer: dense (mptmlp, mptglu), or experts, dropless (mb_dmoe, torch_dmoe) or not (mb_moe)."""

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

    ffn_type: FfnType = "mptmlp"  # dense, or experts; mb_moe has a capacity
    ffn_hidden_size: int | None = Field(None, ge=1)  # F
    ffn_act_fn: ActivationName | None = None
    mlp_type: Literal["mlp", "glu"] = "mlp"  # glu: gated
    moe_num_experts: int = Field(1, ge=1)  # E
    moe_top_k: int = Field(1, ge=1)  # K
    moe_world_size: int | None = Field(None, ge=1)  # ranks that share the experts
    moe_loss_weight: float = Field(0.1, ge=0)  # of the load-balancing loss
    moe_zloss_weight: float = Field(0.0, ge=0)  # of the z-loss
    moe_loss_convention: Literal["megablocks", "hf"] = (
        "megablocks"  # by which the load-balancing loss is scaled
    )
    moe_jitter_eps: float | None = Field(
        None, ge=0, lt=1
    )  # in training the router's input varies by as much
    moe_normalize_expert_weights: float | None = Field(None, gt=0)  # p of the norm
    moe_capacity_factor: float = Field(1.0, ge=0)  # of mb_moe; 0 drops nothing
    uniform_expert_assignment: bool = False  # experts in turn, for benchmarks
    shared_expert: bool = False  # one expert more, for all tokens
    shared_expert_hidden_size: int | None = Field(None, ge=1)  # its width; F if not given
    shared_expert_weighted_sum: bool = False  # K / (K + 1) of the experts and 1 / (K + 1) of it
    moe_score_function: Literal["softmax", "sigmoid"] = "softmax"  # of the logits
    moe_select_first: bool = False  # softmax over the K selected logits only
    moe_weight_scale: float = Field(1.0, gt=0)  # multiplies the weights last
    moe_bias_update_rate: float = Field(
        0.0, ge=0
    )  # above 0: a selection bias, moved so after each step
    moe_num_groups: int = Field(1, ge=1)  # experts stand in so many groups
    moe_groups_kept: int = Field(1, ge=1)  # a token chooses from its best ones
    moe_group_score: Literal["max", "top2"] = (
        "max"  # of the best expert, or the sum of the best two
    )
    dense_layers: list[int] = []  # layers without experts

    @property
    def has_experts(self) -> bool:
        """Say whether the layers are MoE layers."""
        return self.ffn_type in ("mb_dmoe", "mb_moe", "torch_dmoe")

    def activation(self) -> str:
        """Return core's name of the activation; raises ConfigError for one that there is not.

        The default is GELU; of experts that are not gated, its tanh form, which is MegaBlocks' default.
        """
        gated = self.ffn_type == "mptglu" or (self.has_experts and self.mlp_type == "glu")
        default = ActivationName(
            name="gelu", approximate="tanh" if self.has_experts and not gated else "none"
        )
        given, known = self.ffn_act_fn or default, _GATED if gated else _POINTWISE
        if (given.name, given.approximate) not in known:
            names = ", ".join(name if how == "none" else f"{name} ({how})" for name, how in known)
            kind, asked = (
                "gated" if gated else "plain",
                f"{given.name!r} with approximate {given.approximate!r}",
            )
            raise ConfigError(
                f"model.ffn_config.ffn_act_fn is {asked}, which has no {kind} form; these have: {names}"
            )
        return known[given.name, given.approximate]

    def moe(self, ffn_dim: int, bias: bool = False) -> MoEConfig | None:
        """Return the MoE layers, whose single output bias MegaBlocks has where the model has biases.

        Raises ConfigError for keys that contradict each other.
        """
        self._check_agreement()
        if not self.has_experts:
            return None
        shared = (self.shared_expert_hidden_size or ffn_dim) if self.shared_expert else None
        return MoEConfig(
            ffn_dim,
            self.moe_num_experts,
            self.moe_top_k,
            activation=self.activation(),
            output_bias=bias,
            rule=self.rule(),
            shared_dim=shared,
            shared_weighted_sum=self.shared_expert_weighted_sum,
            forced_balance=self.uniform_expert_assignment,
        )

    def _check_agreement(self) -> None:
        check_top_k(
            "model.ffn_config.moe_top_k", self.moe_top_k, "moe_num_experts", self.moe_num_experts
        )
        of_experts = sorted(key for key in self.model_fields_set if key.startswith(_OF_EXPERTS))
        if of_experts and not self.has_experts:
            fault = f"model.ffn_config.{of_experts[0]} is for experts, but ffn_type is {self.ffn_type!r}"
            raise ConfigError(f"{fault}; set ffn_type: mb_dmoe, or drop the key")
        if self.shared_expert_hidden_size is not None and not self.shared_expert:
            fault = (
                "model.ffn_config.shared_expert_hidden_size is given, but shared_expert is false"
            )
            raise ConfigError(f"{fault}; set shared_expert: true, or drop the key")

    def rule(self) -> RoutingRule:
        """Return how tokens choose experts."""
        return RoutingRule(
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
        )

    def auxiliary(self) -> AuxiliaryLoss:
        """Return the losses of the routers."""
        return AuxiliaryLoss(self.moe_loss_weight, self.moe_zloss_weight, self.moe_loss_convention)


def merged(preset: dict[str, Any], given: Any) -> dict[str, Any]:
    """Return a preset with what was given in its place, section by section."""
    result = dict(preset)
    for key, value in dict(given).items():
        below = result.get(key)
        result[key] = (
            merged(below, value) if isinstance(below, dict) and hasattr(value, "items") else value
        )
    return result
