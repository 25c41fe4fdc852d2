"""The config of a transformer. Every definition resolves its keys to a TransformerConfig."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from tokenyard import AuxiliaryLoss, ConfigError, RoutingRule
from tokenyard_models.rope_scaling import RopeScaling

MAX_LAYERS = 2000
MAX_ELEMENTS = 2**58  # of one tensor: its bytes and an optimizer's copies stay below 2**63


@dataclass(frozen=True)
class MoEConfig:
    """The MoE layers of a transformer."""

    ffn_dim: int  # F
    num_experts: int  # E
    top_k: int  # K
    ffn_dims: tuple[int, ...] | None = None  # width of each expert, if they differ
    activation: str = "swiglu"
    bias: bool = False  # in every expert
    output_bias: bool = False  # one for all experts
    rule: RoutingRule = field(default_factory=RoutingRule)
    shared_dim: int | None = None  # width of the shared expert; None: no shared expert
    shared_weighted_sum: bool = False
    forced_balance: bool = False  # benchmarks: slots take experts in turn, the router has no effect


@dataclass(frozen=True)
class TransformerConfig:
    """A decoder-only transformer. Raises ConfigError for impossible sizes."""

    vocab_size: int  # V
    max_seq_len: int
    dim: int  # D
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    moe: MoEConfig | None  # None: dense
    dense_ffn_dim: int | None = None  # F of dense layers
    dense_layers: frozenset[int] = frozenset()
    dense_activation: str = "swiglu"
    bias: bool = False  # in attention, norms and dense layers
    norm: Literal["layer", "rms"] = "rms"
    norm_eps: float = 1e-5
    rope_theta: float | None = 10000.0  # None: learned positions
    rope_scaling: RopeScaling | None = None
    qk_norm: Literal["head", "all"] | None = None  # RMSNorm of queries and keys: by head, or of all
    clip_qkv: float | None = None
    tied_head: bool = False
    auxiliary: AuxiliaryLoss = field(default_factory=AuxiliaryLoss)
    expert_parallel: int | None = None  # ranks that the model's own config sets (moe_world_size)
    model_type: str | None = None  # of the Hugging Face folder, where a family has several

    @property
    def dense_width(self) -> int:
        """Return F of the dense layers."""
        return self.dense_ffn_dim or 4 * self.dim

    def __post_init__(self) -> None:
        for name in ("vocab_size", "max_seq_len", "dim", "layers", "heads", "kv_heads", "head_dim"):
            if getattr(self, name) < 1:
                raise ConfigError(f"model: {name} is {getattr(self, name)}; it must be at least 1")
        self._check_bounds()
        check_divides("model: kv_heads", self.kv_heads, "heads", self.heads)
        if self.rope_theta is not None and self.head_dim % 2:
            raise ConfigError(
                f"model: a head is {self.head_dim} wide; rotary positions need an even width"
            )
        outside = sorted(i for i in self.dense_layers if not 0 <= i < self.layers)
        if outside:
            raise ConfigError(
                f"model: dense_layers names layer {outside[0]}; "
                f"there are layers 0 to {self.layers - 1}"
            )

    def _check_bounds(self) -> None:
        """Raise ConfigError for a model that no machine can build."""
        if self.layers > MAX_LAYERS:
            raise ConfigError(f"model: layers is {self.layers}; it must be at most {MAX_LAYERS}")
        largest = {
            "vocab_size": self.vocab_size * self.dim,
            "max_seq_len": self.max_seq_len * (self.dim if self.rope_theta is None else 1),
            "heads": self.heads * self.head_dim * self.dim,
            "the dense layers' width": 2 * self.dense_width * self.dim,
        }
        if self.moe is not None:
            expert = self.moe.ffn_dim * self.dim
            largest["num_experts"] = 2 * self.moe.num_experts * expert
            largest["the shared expert's width"] = 2 * (self.moe.shared_dim or 0) * self.dim
        name = max(largest, key=largest.__getitem__)
        if largest[name] > MAX_ELEMENTS:
            raise ConfigError(
                f"model: {name} and dim make a tensor of {largest[name]:.3g} numbers; at most "
                f"{MAX_ELEMENTS:.3g} can be addressed, so make them smaller"
            )


def check_divides(key: str, value: int, whole_key: str, whole: int) -> None:
    """Raise ConfigError unless `value` divides `whole`. The error lists divisors up to 256."""
    if whole % value:
        valid = ", ".join(str(n) for n in range(1, min(whole, 256) + 1) if whole % n == 0)
        raise ConfigError(
            f"{key} is {value}, which does not divide {whole_key} {whole}; these do: {valid}"
        )


def check_top_k(key: str, top_k: int, experts_key: str, experts: int) -> None:
    """Raise ConfigError if a token needs more experts than there are."""
    if top_k > experts:
        raise ConfigError(
            f"{key} is {top_k} but {experts_key} is {experts}; choose from 1 to {experts}"
        )
