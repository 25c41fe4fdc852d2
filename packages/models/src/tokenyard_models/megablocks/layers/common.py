"""What all layers share: dtypes, and tokenyard's parts for a tensor's dtype and device."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from tokenyard import ConfigError, RoutingRule, Workload, default_registry
from tokenyard.activations import GATED, POINTWISE
from tokenyard.interfaces import Exchange, ExpertKernel, Permutation
from tokenyard_models.megablocks.layers.arguments import Arguments

T = TypeVar("T")


def dtype(args: Arguments) -> torch.dtype | None:
    """Return the dtype of the parameters; None is torch's default."""
    if args.fp16:
        return torch.float16
    return torch.bfloat16 if args.bf16 else None


def cast_if_autocast_enabled(x: Tensor) -> Tensor:
    """Return x in autocast's dtype, where autocast is on."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


def activation_name(args: Arguments) -> str | None:
    """Return tokenyard's name of the activation; None for a function that has no kernel.

    Functions are compared by their values, so that a lambda is known, too.
    """
    z = torch.linspace(-6, 6, 97, dtype=torch.float64)
    try:
        with torch.no_grad():
            values = args.activation_fn(z.clone())
    except (RuntimeError, ValueError, AssertionError):  # a kernel for one dtype or device
        return None
    functions = GATED if args.mlp_type == "glu" else POINTWISE
    equal = [name for name, known in functions.items() if _equal(known, z, values)]
    return next(iter(equal), None)


def _equal(function: Callable[[Tensor], Tensor], z: Tensor, values: Tensor) -> bool:
    known = function(z)
    return values.shape == known.shape and torch.allclose(
        known, values.to(z), rtol=1e-12, atol=1e-12
    )


def expert_ranks(args: Arguments) -> tuple[int, int]:
    """Return this rank and the number of ranks that share the experts.

    Raises ConfigError if the experts cannot be divided among them.
    """
    if not args.moe_expert_model_parallelism:
        return 0, 1
    import torch.distributed as dist

    group = args.expert_parallel_group
    size = dist.get_world_size(group)
    if args.moe_num_experts % size:
        raise ConfigError(
            f"moe_num_experts is {args.moe_num_experts}, which {size} ranks cannot share evenly; "
            "whole experts are on a rank, and none is split"
        )
    return dist.get_rank(group), size


def all_gather(x: Tensor, args: Arguments) -> Tensor:
    """Return the tensor of each rank that shares the experts, stacked."""
    import torch.distributed as dist

    parts = [torch.empty_like(x) for _ in range(expert_ranks(args)[1])]
    dist.all_gather(parts, x, group=args.expert_parallel_group)
    return torch.stack(parts)


@torch.compiler.disable  # compiled code would save again in a recompute
def save(values: list[T], value: T) -> None:
    """Add what a forward pass gives for the loss to those of its other layers.

    A recompute in the backward pass (activation checkpointing) adds nothing.
    """
    # no backward pass is running; private: torch 2.11 to 2.13
    if torch._C._current_graph_task_id() == -1:
        values.append(value)


def warn_without_gradient(name: str, saved: Sequence[Tensor]) -> None:
    """Warn of a loss that cannot train the router, as its inputs were computed without gradients.

    The cause is activation checkpointing with ``use_reentrant=True``, or a frozen router.
    """
    if torch.is_grad_enabled() and not all(value.requires_grad for value in saved):
        warnings.warn(
            f"{name} has no gradient for a router, because the layer ran without gradients; with "
            "activation checkpointing set use_reentrant=False",
            stacklevel=3,
        )


def exchange_request(group: Any) -> str:
    """Return "auto" if the ranks of a group are neighbours, which a workload assumes.

    Other ranks may be on several nodes, which not every exchange connects.
    """
    ranks = torch.distributed.get_process_group_ranks(group)
    first = ranks[0] // len(ranks) * len(ranks)
    return "auto" if ranks == list(range(first, first + len(ranks))) else "all_to_all_tokens"


class Parts(NamedTuple):
    """The backends of a layer, for one dtype and device."""

    router: nn.Module
    permutation: Permutation
    kernel: ExpertKernel | None  # None: no backend has the activation
    exchange: Exchange


class PartsCache:
    """Chooses backends when a layer meets a dtype and a device for the first time.

    A copy chooses its own: backends may hold what can be neither copied nor pickled.
    """

    def __init__(self, args: Arguments):
        self._args = args
        self._name = activation_name(args)
        self._parts: dict[tuple[torch.dtype, torch.device], Parts] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_parts": {}}

    def of(self, x: Tensor) -> Parts:
        """Return the parts for x. Raises BackendError if there are none."""
        key = (x.dtype, x.device)
        if key not in self._parts:
            self._parts[key] = self._choose(x)
        return self._parts[key]

    @torch.compiler.disable  # torch.compile goes on after the choice, which is made once
    def _choose(self, x: Tensor) -> Parts:
        args = self._args
        workload = Workload(
            args.hidden_size,
            args.ffn_hidden_size,
            args.moe_num_experts,
            args.moe_top_k,
            activation=self._name or ("swiglu" if args.mlp_type == "glu" else "gelu"),
            router=RoutingRule(
                normalize=args.moe_normalize_expert_weights or None,
                jitter=args.moe_jitter_eps or 0.0,
            ),
            dtype=x.dtype,
            device=x.device,
            expert_parallel=expert_ranks(args)[1],
        )
        registry = default_registry()
        permutation = registry.choose("permutation", None, workload).construct(workload)
        kernel = None
        if self._name is not None:
            kernel = registry.choose("experts", None, workload).construct(workload, permutation)
        with torch.device("meta"):  # the layer owns the weight
            router = registry.choose("router", None, workload).construct(workload)
        group = args.expert_parallel_group
        if workload.expert_parallel > 1 and group is None:
            group = torch.distributed.group.WORLD
        request = exchange_request(group) if workload.expert_parallel > 1 else None
        exchange = registry.choose("exchange", request, workload)
        return Parts(router, permutation, kernel, exchange.construct(workload, permutation, group))
