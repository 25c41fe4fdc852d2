"""Activation checkpointing: compute a block again in the backward pass, whole or by operator.

Selective recompute keeps the results that are expensive to compute again: those of matmuls,
attention, expert kernels, router choices and all-to-alls. The rest, such as norms, activations,
residuals, casts and rotary positions, is computed again. Source: Korthikanti et al. 2022,
arXiv 2205.05198, section 5.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, TypeVar

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
    noop_context_fn,
)

from tokenyard.recompute_rng import Draws, draws_of_next_call

T = TypeVar("T")
Contexts = tuple[AbstractContextManager[Any], AbstractContextManager[Any]]
"""The contexts of a forward pass and of its recompute."""

_MATMULS = ("mm", "addmm", "bmm", "baddbmm", "_scaled_mm", "_grouped_mm", "_scaled_grouped_mm")
_ATTENTION = (
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_fused_attention_overrideable",
    "_flash_attention_forward",
    "_efficient_attention_forward",
)
_KEPT = frozenset(
    (
        *(f"aten::{name}" for name in _MATMULS + _ATTENTION),
        "torch_attn::_varlen_attn",
        "_c10d_functional::all_to_all_single",
    )
)


def recomputed(forward: Callable[..., T], selective: bool = False) -> Callable[..., T]:
    """Return a forward pass that computes in the backward pass again what it does not keep.

    It keeps its inputs, and with `selective` also the results of expensive operators. The gradients
    are bit-identical to those without recompute, random numbers included. With `selective`, the
    backward pass runs only once, and ``torch.compile`` must be around this function, not inside it.
    In a CUDA graph, random numbers need ``recompute_rng.RecomputeRng``.
    """
    contexts = _selective_contexts if selective else noop_context_fn
    # the compiler takes no `noop_context_fn`, although it is the default
    options: dict[str, Any] = {"context_fn": contexts} if selective else {}
    again = partial(checkpoint, forward, use_reentrant=False)

    def run(*args: Any, **kwargs: Any) -> T:
        draws = None if torch.compiler.is_compiling() else draws_of_next_call()
        if draws is None:
            result: T = again(*args, **options, **kwargs)
            return result
        kwargs["context_fn"] = partial(_drawing, draws, contexts)
        result = again(*args, preserve_rng_state=False, **kwargs)
        return result

    return run


def is_kept(op: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Return whether selective recompute keeps the results of a call of an operator.

    Kept are the operators of torch that are listed here, those that are registered with
    ``tokenyard.operators.operator(..., kept=True)``, and copies from a GPU to the host, because
    each is a host sync.
    """
    if op is torch.ops.aten._to_copy.default:
        device = kwargs.get("device") or args[0].device
        return args[0].device.type != "cpu" and torch.device(device).type == "cpu"
    name: str = op.name()  # such as aten::mm.default
    return getattr(op, "kept", False) or name.partition(".")[0] in _KEPT


def _drawing(draws: Draws, contexts: Callable[[], Contexts]) -> Contexts:
    """Return `contexts`, with the recompute's random numbers from `draws`."""

    @contextmanager
    def recompute(again: AbstractContextManager[Any]) -> Iterator[None]:
        with draws, again:
            yield

    forward, again = contexts()
    return forward, recompute(again)


def _selective_contexts() -> Contexts:
    forward, again = create_selective_checkpoint_contexts(_policy)
    return forward, again if torch.compiler.is_compiling() else _KeptOnly(again)


def _policy(_: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    kept = is_kept(op, args, kwargs)
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


class _KeptOnly(TorchDispatchMode):
    """torch's context of a recompute, for kept operators only.

    Others may differ from those of the forward pass, which torch refuses: FSDP gathers parameters
    again in a recompute.
    """

    def __init__(self, again: Any):
        super().__init__()
        self.again = again

    def __torch_dispatch__(
        self, op: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if is_kept(op, args, kwargs):
            return self.again.__torch_dispatch__(op, types, args, kwargs)
        return op(*args, **kwargs)
