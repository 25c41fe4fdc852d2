"""Core's own backends, registered with the same hooks as any plugin's."""

from __future__ import annotations

from tokenyard.backend import Backend
from tokenyard.hookspecs import hookimpl
from tokenyard.workload import RoutingRule, Workload


def _cpu_only(workload: Workload) -> str | None:
    device = workload.device.type
    if device == "cpu":
        return None
    return f"'cpu' computes on a CPU, and the device is {device!r}"


def _local_only(workload: Workload) -> str | None:
    if workload.expert_parallel == 1:
        return None
    return f"'local' keeps tokens on their rank, and expert_parallel is {workload.expert_parallel}"


def _router(algorithm: str, cls: str, *unused: str) -> Backend:
    """Return the offer of a routing algorithm that does not use some fields of `RoutingRule`."""

    def unusable(workload: Workload) -> str | None:
        for name in unused:
            if getattr(workload.router, name) != getattr(_DEFAULT_RULE, name):
                return f"{algorithm!r} does not use {name}; leave it out"
        return None

    return Backend(algorithm, f"tokenyard.routers:{cls}", unusable=unusable, algorithm=algorithm)


_DEFAULT_RULE = RoutingRule()
_BIAS = "bias_update_rate"
_GROUPS = "num_groups"
_CAPACITY = "capacity_factor"


@hookimpl
def tokenyard_routers() -> list[Backend]:
    """Offer the top-k router, and the routers that balance the tokens of a batch."""
    return [
        Backend("torch", "tokenyard.routers:TopKRouter", algorithm="topk"),
        _router("expert_choice", "ExpertChoiceRouter", _BIAS, _GROUPS, _CAPACITY),
        _router("sinkhorn", "SinkhornRouter", _BIAS),
        _router("token_rounding", "TokenRoundingRouter", _CAPACITY),
    ]


@hookimpl
def tokenyard_permutations() -> list[Backend]:
    """Offer the permutation that sorts slots."""
    return [Backend("torch", "tokenyard.permutations:TorchPermutation")]


@hookimpl
def tokenyard_experts() -> list[Backend]:
    """Offer the grouped-GEMM kernel, a CPU kernel, and a reference loop over experts."""
    return [
        Backend("cpu", "tokenyard.experts:CpuExperts", priority=1, unusable=_cpu_only),
        Backend("torch", "tokenyard.experts:TorchExperts"),
        Backend("loop", "tokenyard.experts:LoopExperts", priority=-10),
    ]


@hookimpl
def tokenyard_exchanges() -> list[Backend]:
    """Offer the exchange that keeps tokens on their rank."""
    return [Backend("local", "tokenyard.exchanges:LocalExchange", unusable=_local_only)]


@hookimpl
def tokenyard_strategies() -> list[Backend]:
    """Offer the strategy for one device."""
    return [Backend("single", "tokenyard.strategies:SingleStrategy")]
