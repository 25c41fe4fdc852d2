"""Core's own backends, registered through the same door as any plugin's."""

from __future__ import annotations

from tokenyard.backend import Backend
from tokenyard.hookspecs import hookimpl
from tokenyard.workload import Workload


def _topk_only(workload: Workload) -> str | None:
    algorithm = workload.router.algorithm
    return (
        None
        if algorithm == "topk"
        else f"'torch' computes the router algorithm 'topk', not {algorithm!r}"
    )


def _cpu_only(workload: Workload) -> str | None:
    device = workload.device.type
    return None if device == "cpu" else f"'cpu' computes on a CPU, and the device is {device!r}"


def _local_only(workload: Workload) -> str | None:
    if workload.expert_parallel == 1:
        return None
    return f"'local' keeps tokens on their rank, and expert_parallel is {workload.expert_parallel}"


@hookimpl
def tokenyard_routers() -> list[Backend]:
    """Offer the top-k router."""
    return [Backend("torch", "tokenyard.routers:TopKRouter", unusable=_topk_only)]


@hookimpl
def tokenyard_permutations() -> list[Backend]:
    """Offer the permutation by sorting."""
    return [Backend("torch", "tokenyard.permutations:TorchPermutation")]


@hookimpl
def tokenyard_experts() -> list[Backend]:
    """Offer the kernel of grouped products, one for CPUs, and the loop that serves as their oracle."""
    return [
        Backend("cpu", "tokenyard.experts:CpuExperts", priority=1, unusable=_cpu_only),
        Backend("torch", "tokenyard.experts:TorchExperts"),
        Backend("loop", "tokenyard.experts:LoopExperts", priority=-10),
    ]


@hookimpl
def tokenyard_exchanges() -> list[Backend]:
    """Offer the exchange that moves nothing."""
    return [Backend("local", "tokenyard.exchanges:LocalExchange", unusable=_local_only)]


@hookimpl
def tokenyard_strategies() -> list[Backend]:
    """Offer the layout on one device."""
    return [Backend("single", "tokenyard.strategies:SingleStrategy")]
