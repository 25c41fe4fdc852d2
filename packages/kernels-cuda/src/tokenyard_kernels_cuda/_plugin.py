"""What this package offers, and when it can be used; importing it imports nothing of cuda.bindings."""

from __future__ import annotations

from importlib import metadata

import torch

from tokenyard import Backend, Workload, hookimpl

_SCORES = ("softmax", "sigmoid")
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_PRIORITY = 30  # before Triton's: faster wherever they were measured (docs/benchmarks)


def no_cuda(workload: Workload) -> str | None:
    """Say why CUDA kernels cannot run for a workload at all."""
    if torch.version.hip is not None:
        return "'cuda' is for NVIDIA's GPUs, and this torch is built for AMD's"
    if workload.device.type != "cuda":
        return f"'cuda' computes on a GPU, and the device is {workload.device.type!r}"
    if (reason := _no_bindings()) is not None:
        return reason
    if workload.capability is not None and workload.capability < (8, 0):
        major, minor = workload.capability
        return f"'cuda' needs a GPU of compute capability 8.0 or later, and this is {major}.{minor}"
    if workload.dtype not in _DTYPES:
        return f"'cuda' computes in bfloat16, float16 and float32, not in {str(workload.dtype).removeprefix('torch.')}"
    return None


def no_permutation(workload: Workload) -> str | None:
    """Say why the permutation cannot be used for a workload."""
    return _too_many(workload, 4095, "sorts by") or no_cuda(workload)


def no_router(workload: Workload) -> str | None:
    """Say why the router cannot be used for a workload."""
    if workload.router.algorithm != "topk":
        return f"'cuda' computes the router algorithm 'topk', not {workload.router.algorithm!r}"
    if workload.router.score not in _SCORES:  # as a later core may have
        return (
            f"'cuda' computes the router scores {', '.join(_SCORES)}, not {workload.router.score!r}"
        )
    return _too_many(workload, 1024, "routes to") or no_cuda(workload)


def _too_many(workload: Workload, most: int, does: str) -> str | None:
    if workload.num_experts <= most:
        return None
    return f"'cuda' {does} at most {most} experts, and num_experts is {workload.num_experts}"


def _no_bindings() -> str | None:
    """Say why compiler and driver cannot be reached; cuda-bindings looks for those of its own CUDA release."""
    found, theirs = _version("cuda-bindings"), torch.version.cuda
    if found is None:
        return "'cuda' needs cuda-bindings, which comes with torch's CUDA builds for Linux; pip install cuda-bindings"
    if theirs is not None and _major(found) != _major(theirs):
        need = f"'cuda' needs cuda-bindings for CUDA {theirs}, as torch is built for it"
        return f'{need}, and {found} is installed; pip install "cuda-bindings=={_major(theirs)}.*"'
    return None


def _major(version: str) -> str:
    return version.partition(".")[0]


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


@hookimpl
def tokenyard_routers() -> list[Backend]:
    """Offer the top-k router with scores, selection and weights fused."""
    return [Backend("cuda", "tokenyard_kernels_cuda.router:CudaRouter", _PRIORITY, no_router)]


@hookimpl
def tokenyard_permutations() -> list[Backend]:
    """Offer the plan in two launches, and its moves."""
    return [
        Backend(
            "cuda", "tokenyard_kernels_cuda.permutation:CudaPermutation", _PRIORITY, no_permutation
        )
    ]
