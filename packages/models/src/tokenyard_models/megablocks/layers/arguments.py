"""The arguments of MegaBlocks' layers. Every field has its meaning there, or is refused."""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tokenyard import ConfigError
from tokenyard.errors import one_of

InitFn = Callable[[Tensor], Any]
"""Fills a tensor in place."""

DEFAULT_ACTIVATION_FN: Callable[[Tensor], Tensor] = partial(F.gelu, approximate="tanh")

_NORMAL: InitFn = partial(torch.nn.init.normal_, mean=0.0, std=0.02)


_AT_LEAST = {
    **dict.fromkeys(("hidden_size", "ffn_hidden_size", "moe_num_experts", "moe_top_k"), 1),
    **dict.fromkeys(("num_layers", "pipeline_model_parallel_size"), 1),
    **dict.fromkeys(("num_layers_per_virtual_pipeline_stage", "shared_expert_hidden_size"), 1),
    **dict.fromkeys(("moe_capacity_factor", "moe_loss_weight", "moe_zloss_weight"), 0),
    **dict.fromkeys(("moe_normalize_expert_weights", "moe_jitter_eps"), 0),
}
"""The smallest value of each number in Arguments."""

_OPTIONAL = frozenset(
    (
        "moe_jitter_eps",
        "moe_normalize_expert_weights",
        "num_layers_per_virtual_pipeline_stage",
        "shared_expert_hidden_size",
    )
)
"""The numbers that may be None."""


def _device() -> torch.device:
    """Return the current GPU, or the CPU of a machine without one."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


@dataclasses.dataclass
class Arguments:
    """The options of MoE and dMoE. Raises ConfigError for what is not here."""

    hidden_size: int = 1024  # D
    ffn_hidden_size: int = 4096  # F
    num_layers: int = 1  # of the model, for the load-balancing loss
    bias: bool = True  # one output bias [D] of the layer
    return_bias: bool = True  # return it beside the result, instead of adding it
    # a known function has a kernel; any other is computed expert by expert
    activation_fn: Callable[[Tensor], Tensor] = DEFAULT_ACTIVATION_FN

    moe_num_experts: int = 1  # E
    moe_top_k: int = 1  # K
    moe_capacity_factor: float = 1  # of MoE; 0 drops nothing
    moe_normalize_expert_weights: float | None = None  # divide K weights by this p-norm
    moe_loss_weight: float = 0.1
    moe_jitter_eps: float | None = None
    moe_lbl_in_fp32: bool = False  # no effect: the loss is in float32

    moe_expert_model_parallelism: bool = False  # the group's ranks share the experts
    expert_parallel_group: Any = None  # of torch.distributed; None: all ranks
    pipeline_model_parallel_size: int = 1  # stages that the layers are split into
    num_layers_per_virtual_pipeline_stage: int | None = None

    memory_optimized_mlp: bool = False  # no effect: kernels keep the pre-activation alone
    mlp_type: str = "mlp"  # or glu: gated, dMoE only
    mlp_impl: str = "grouped"  # or sparse: no effect, tokenyard's backends compute both

    fp16: bool = True  # dtype of the parameters; it comes before bf16
    bf16: bool = False
    device: int | torch.device | str = dataclasses.field(default_factory=_device)
    init_method: InitFn = _NORMAL  # of router and experts
    output_layer_init_method: InitFn = _NORMAL  # of w2

    uniform_expert_assignment: bool = False  # slots take experts in turn

    shared_expert: bool = False  # a dense FFN for every token
    fc_cls: Any = torch.nn.Linear  # its linear layers
    fc_kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
    remat_act_fn: bool = True  # no effect, as in MegaBlocks
    shared_expert_hidden_size: int | None = None  # None: ffn_hidden_size
    shared_expert_weighted_sum: bool = False  # weights K / (K + 1) and 1 / (K + 1)

    moe_zloss_weight: float = 0
    moe_zloss_in_fp32: bool = False  # no effect: the logits are in float32

    def __post_init__(self) -> None:
        one_of("mlp_type", str(self.mlp_type), ("mlp", "glu"))
        one_of("mlp_impl", str(self.mlp_impl), ("grouped", "sparse"))
        self._check_numbers()
        if not callable(self.activation_fn):
            raise ConfigError(
                f"activation_fn is {self.activation_fn!r}; give a function of a tensor, such as "
                "torch.nn.functional.silu"
            )
        if self.shared_expert and self.bias and self.return_bias:
            raise ConfigError(
                "return_bias is true with a shared expert, whose result would be added to a tuple; "
                "set return_bias=False"
            )
        if self.moe_top_k > self.moe_num_experts:
            raise ConfigError(
                f"moe_top_k is {self.moe_top_k} but moe_num_experts is {self.moe_num_experts}; "
                f"choose from 1 to {self.moe_num_experts}"
            )
        if self.shared_expert_hidden_size is None:
            self.shared_expert_hidden_size = self.ffn_hidden_size

    def _check_numbers(self) -> None:
        for name, least in _AT_LEAST.items():
            value = getattr(self, name)
            if value is None and name in _OPTIONAL:
                continue
            if not isinstance(value, numbers.Real) or not least <= float(value) < math.inf:
                raise ConfigError(f"{name} is {value!r}; it must be a number of at least {least}")
        if (self.moe_jitter_eps or 0) >= 1:
            raise ConfigError(f"moe_jitter_eps is {self.moe_jitter_eps}; it must be below 1")


def from_megatron(megatron_args: Any) -> Arguments:
    """Return the arguments that an object has as attributes; the rest are defaults."""
    names = [field.name for field in dataclasses.fields(Arguments)]
    return Arguments(**{n: getattr(megatron_args, n) for n in names if hasattr(megatron_args, n)})
