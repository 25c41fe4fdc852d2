"""Backends of this package and their requirements. Importing it does not import cuda.bindings."""

from __future__ import annotations

from importlib import metadata

import torch

from tokenyard import Backend, Workload, hookimpl
from tokenyard.cuda_driver import NO_DRIVER, has_driver

_SCORES = ("softmax", "sigmoid")
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_PRIORITY = 30  # above Triton's 20: faster in every measurement (docs/benchmarks)


def no_cuda(workload: Workload) -> str | None:
    """Return why no CUDA kernel can run a workload, or None."""
    if torch.version.hip is not None:
        return "'cuda' is for NVIDIA's GPUs, and this torch is built for AMD's"
    if workload.device.type != "cuda":
        return f"'cuda' computes on a GPU, and the device is {workload.device.type!r}"
    if (reason := _no_bindings()) is not None:
        return reason
    if workload.capability is not None and workload.capability < (8, 0):
        major, minor = workload.capability
        return f"'cuda' needs a GPU of compute capability 8.0 or later, and this is {major}.{minor}"
    if torch.cuda.is_available() and not has_driver():  # without a GPU, another machine is planned
        return f"'cuda' cannot launch: {NO_DRIVER}"
    if workload.dtype not in _DTYPES:
        dtype = str(workload.dtype).removeprefix("torch.")
        return f"'cuda' computes in bfloat16, float16 and float32, not in {dtype}"
    return None


def no_permutation(workload: Workload) -> str | None:
    """Return why the permutation cannot run a workload, or None."""
    return _too_many(workload, 4095, "sorts by") or no_cuda(workload)


def no_router(workload: Workload) -> str | None:
    """Return why the router cannot run a workload, or None."""
    if workload.router.score not in _SCORES:  # a later core may add scores
        return (
            f"'cuda' computes the router scores {', '.join(_SCORES)}, not {workload.router.score!r}"
        )
    return _too_many(workload, 1024, "routes to") or no_cuda(workload)


def _too_many(workload: Workload, limit: int, verb: str) -> str | None:
    if workload.num_experts <= limit:
        return None
    return f"'cuda' {verb} at most {limit} experts, and num_experts is {workload.num_experts}"


def _no_bindings() -> str | None:
    """Return why NVRTC and the driver are not available, or None.

    cuda-bindings loads the libraries of its own CUDA release, so its major version must be torch's.
    """
    installed = _version("cuda-bindings")
    cuda = torch.version.cuda
    if installed is None:
        return (
            "'cuda' needs cuda-bindings, which comes with torch's CUDA builds for Linux; "
            "pip install cuda-bindings"
        )
    if cuda is not None and _major(installed) != _major(cuda):
        return (
            f"'cuda' needs cuda-bindings for CUDA {cuda}, as torch is built for it, "
            f'and {installed} is installed; pip install "cuda-bindings=={_major(cuda)}.*"'
        )
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
    """Register the top-k router, which fuses scores, selection and weights."""
    router = "tokenyard_kernels_cuda.router:CudaRouter"
    return [Backend("cuda", router, _PRIORITY, no_router, algorithm="topk")]


@hookimpl
def tokenyard_permutations() -> list[Backend]:
    """Register the permutation, which plans in two launches."""
    return [
        Backend(
            "cuda", "tokenyard_kernels_cuda.permutation:CudaPermutation", _PRIORITY, no_permutation
        )
    ]
