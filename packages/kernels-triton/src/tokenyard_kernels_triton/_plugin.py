"""The backends of this package and the workloads they support. Does not import triton."""

from __future__ import annotations

import importlib.util
import os

import torch
from torch import Tensor

from tokenyard import Backend, Workload, hookimpl
from tokenyard.cross_entropy import replace_by_gradient
from tokenyard.packed_rows import pack_plainly, unpack_plainly
from tokenyard_kernels_triton._device import GLUON, triton_minor_version

_SCORES = ("softmax", "sigmoid")
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_FAST = 20  # before core's backends, on a GPU
_LAST = -20  # after all others, in the interpreter
_BY_NAME = -5  # after core's backends
_ON_NODE = -1  # after core's `local`, before the exchanges of tokenyard-parallel


@torch.library.impl("tokenyard::replace_by_gradient", "cuda")
def _replace_by_gradient(logits: Tensor, ids: Tensor, scale: Tensor) -> Tensor:
    """Compute the loss of training, which core calls through its operator, by a kernel."""
    if importlib.util.find_spec("triton") is None or logits.dtype not in _DTYPES:
        return replace_by_gradient(logits, ids, scale)
    from tokenyard_kernels_triton.ops import _cross_entropy

    return _cross_entropy.replace_by_gradient(logits, ids, scale)


@torch.library.impl("tokenyard::pack_rows", "cuda")
def _pack_rows(rows: Tensor) -> Tensor:
    """Quantize the rows that an exchange sends, by a kernel."""
    if not _has_packing_kernel(rows.device, rows.dtype):
        return pack_plainly(rows)
    from tokenyard_kernels_triton.ops import _packed_rows

    return _packed_rows.pack_rows(rows)


@torch.library.impl("tokenyard::unpack_rows", "cuda")
def _unpack_rows(packed: Tensor, dtype: torch.dtype) -> Tensor:
    """Dequantize the rows that an exchange received, by a kernel."""
    if not _has_packing_kernel(packed.device, dtype):
        return unpack_plainly(packed, dtype)
    from tokenyard_kernels_triton.ops import _packed_rows

    return _packed_rows.unpack_rows(packed, dtype)


def _has_packing_kernel(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether Triton converts rows to e4m3: from compute capability 8.9 on."""
    if importlib.util.find_spec("triton") is None or dtype not in _DTYPES:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 9)


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def no_triton(workload: Workload) -> str | None:
    """Return why Triton cannot run a workload, or None if it can."""
    if importlib.util.find_spec("triton") is None:
        return "'triton' needs the library triton, which is not installed; it comes for Linux"
    if workload.device.type != "cuda" and not (_interpreted() and workload.device.type == "cpu"):
        return (
            f"'triton' computes on a GPU, and the device is {workload.device.type!r} "
            "(TRITON_INTERPRET=1 is for tests on a CPU)"
        )
    if workload.dtype not in _DTYPES:
        return (
            f"'triton' computes in bfloat16, float16 and float32, not in {_short(workload.dtype)}"
        )
    return _too_old("triton", workload)


def _too_old(name: str, workload: Workload) -> str | None:
    """Return why Triton does not compile for a GPU, or None; None also if it is not here."""
    capability = workload.capability if workload.device.type == "cuda" else None
    if capability is None or capability >= (8, 0):
        return None
    major, minor = capability
    return f"{name!r} needs a GPU of compute capability 8.0 or later, and this is {major}.{minor}"


def no_gluon(workload: Workload) -> str | None:
    """Return why the Gluon kernels cannot run a workload, or None if they can."""
    if (reason := no_triton(workload)) is not None:
        return reason.replace("'triton'", "'gluon'", 1)
    hopper = (
        workload.device.type == "cuda"
        and workload.capability is not None
        and workload.capability[0] == 9
    )
    if not hopper or torch.version.hip is not None:  # AMD GPUs have such numbers, too
        return "'gluon' needs a Hopper GPU (compute capability 9.0)"
    if workload.dtype not in (torch.bfloat16, torch.float16):
        return f"'gluon' computes in bfloat16 and float16, not in {_short(workload.dtype)}"
    for name in ("dim", "ffn_dim"):
        if getattr(workload, name) % 8:
            size = getattr(workload, name)
            return (
                f"'gluon' needs rows of whole 16 bytes, and {name} is {size}, not a multiple of 8"
            )
    version = triton_minor_version()
    if version not in GLUON:
        return f"'gluon' was tried with Triton {', '.join(GLUON)}, and {version} is installed"
    return None


def no_sparse(workload: Workload) -> str | None:
    """Return why the block-sparse matmuls cannot run a workload, or None if they can.

    On a CPU they are plain torch, but still need the library triton.
    """
    on_cpu = workload.device.type == "cpu" and workload.dtype in _DTYPES
    if not on_cpu or importlib.util.find_spec("triton") is None:
        reason = no_triton(workload)
        if reason is not None:
            return reason.replace("'triton'", "'sparse'", 1)
    if workload.bias:
        return "'sparse' has no biases of experts; set bias: false"
    for width in workload.ffn_dims or (workload.ffn_dim,):
        if width % 64:
            return f"'sparse' has blocks of 64 columns, and {width} is not a multiple of 64"
    return None


def no_router(workload: Workload) -> str | None:
    """Return why the router cannot run a workload, or None if it can."""
    score = workload.router.score
    if score not in _SCORES:  # a later core may have more scores
        return f"'triton' computes the router scores {', '.join(_SCORES)}, not {score!r}"
    if workload.num_experts > 1024:
        return f"'triton' routes to at most 1024 experts, and num_experts is {workload.num_experts}"
    return no_triton(workload)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def no_symmetric_memory(workload: Workload) -> str | None:
    """Return why ranks cannot read each other's memory, or None if they can."""
    device = workload.device
    if device.type == "cpu" and _interpreted():
        return None  # in plain torch
    if device.type != "cuda" or torch.version.hip is not None:
        return f"'symmetric_memory' needs NVIDIA GPUs, and the device is {device.type!r}"
    if importlib.util.find_spec("triton") is None:
        return "'symmetric_memory' needs the library triton, which is not installed"
    if (reason := _too_old("symmetric_memory", workload)) is not None:
        return reason
    ranks = workload.expert_parallel
    unknown = "0" if "WORLD_SIZE" in os.environ else str(ranks)
    on_node = int(os.environ.get("LOCAL_WORLD_SIZE", unknown))
    if ranks > 1 and (on_node % ranks or on_node == 0):
        return (
            f"'symmetric_memory' needs the {ranks} ranks that share experts on one node, and "
            f"LOCAL_WORLD_SIZE is {on_node or 'not set'}"
        )
    rank = os.environ.get("RANK", "0")
    first = int(rank) - int(os.environ.get("LOCAL_RANK", rank))  # all ranks must answer the same
    if first % ranks:
        return (
            f"'symmetric_memory' needs the {ranks} ranks that share experts on one node, and the "
            f"first rank of this node is {first}"
        )
    visible = torch.cuda.device_count()
    if "LOCAL_WORLD_SIZE" in os.environ and 0 < visible < ranks:  # else it is a plan
        return (
            f"'symmetric_memory' needs each rank to see the GPUs of the {ranks} ranks that share "
            f"experts, and torch finds {visible} here (CUDA_VISIBLE_DEVICES)"
        )
    return _no_peers(device.index or 0, ranks)


def _no_peers(index: int, ranks: int) -> str | None:
    """Return why a GPU cannot read its neighbours' memory; None also if they are not here."""
    first = index // ranks * ranks
    for peer in range(first, min(first + ranks, torch.cuda.device_count())):
        if peer != index and not torch.cuda.can_device_access_peer(index, peer):
            return f"'symmetric_memory' needs GPU {index} to read the memory of GPU {peer}"
    return None


_PRIORITY = _LAST if _interpreted() else _FAST


@hookimpl
def tokenyard_routers() -> list[Backend]:
    """Offer the top-k router with selection and weights fused."""
    router = "tokenyard_kernels_triton.router:TritonRouter"
    return [Backend("triton", router, _PRIORITY, no_router, algorithm="topk")]


@hookimpl
def tokenyard_permutations() -> list[Backend]:
    """Offer the permutation: a plan in three launches, and its copies."""
    return [
        Backend(
            "triton", "tokenyard_kernels_triton.permutation:TritonPermutation", _PRIORITY, no_triton
        )
    ]


@hookimpl
def tokenyard_exchanges() -> list[Backend]:
    """Offer the exchange between ranks of one node; it comes before those of tokenyard-parallel."""
    exchange = "tokenyard_kernels_triton.symmetric_memory:SymmetricMemoryExchange"
    priority = _LAST if _interpreted() else _ON_NODE
    return [Backend("symmetric_memory", exchange, priority, no_symmetric_memory)]


@hookimpl
def tokenyard_experts() -> list[Backend]:
    """Offer the experts for any GPU, those for Hopper GPUs, and those that are block-sparse."""
    sparse = "tokenyard_kernels_triton.sparse_experts:SparseExperts"
    return [
        Backend("triton", "tokenyard_kernels_triton.experts:TritonExperts", _PRIORITY, no_triton),
        Backend("gluon", "tokenyard_kernels_triton.experts:GluonExperts", _PRIORITY + 10, no_gluon),
        Backend("sparse", sparse, _BY_NAME, no_sparse, any_width=True),
    ]
