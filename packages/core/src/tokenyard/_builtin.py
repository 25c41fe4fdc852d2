"""Core's own backends, registered with the same hooks as any plugin's."""

from __future__ import annotations

from tokenyard.backend import Backend
from tokenyard.hookspecs import hookimpl
from tokenyard.workload import Workload


def _cpu_only(workload: Workload) -> str | None:
    device = workload.device.type
    if device == "cpu":
        return None
    return f"'cpu' computes on a CPU, and the device is {device!r}"


def _local_only(workload: Workload) -> str | None:
    if workload.expert_parallel == 1:
        return None
    return f"'local' keeps tokens on their rank, and expert_parallel is {workload.expert_parallel}"


@hookimpl
def tokenyard_routers() -> list[Backend]:
    """Offer the top-k router."""
    return [Backend("torch", "tokenyard.routers:TopKRouter", algorithm="topk")]


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
