"""Compile the blocks of a model by torch.compile, for training steps."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from tokenyard import Model, moe_layers

log = logging.getLogger("tokenyard")

_C_COMPILERS = ("cc", "gcc", "clang")
_CPP_COMPILERS = ("c++", "g++", "clang++")


def compile_blocks(model: Model, device: str, eager_experts: bool = False) -> None:
    """Compile each block's forward pass. Without a compiler on this machine, only warn.

    Blocks of one architecture share the compiled code. Evaluation and generation do not use it:
    their shapes differ from call to call. With `eager_experts`, experts run between two compiled
    parts of a block: FSDP gathers them, and an exchange has other shapes in each step.
    """
    reason = missing_compiler(device)
    if reason is not None:
        log.warning("compile is true, but %s; blocks run without torch.compile", reason)
        return
    if eager_experts:
        for moe in moe_layers(model):
            experts: nn.Module = moe.experts
            experts.forward = torch.compiler.disable(experts.forward)
    for block in model.blocks:
        block.forward = _train_compiled(block)


def missing_compiler(device: str) -> str | None:
    """Return what torch.compile lacks on this machine to compile for a device, or None."""
    if device.startswith("cuda"):
        if find_spec("triton") is None:
            return "triton is not installed"
        compilers = _C_COMPILERS
    else:
        compilers = _CPP_COMPILERS
    if not any(map(shutil.which, compilers)):
        return f"no C compiler is found (tried {', '.join(compilers)})"
    return None


def _train_compiled(block: nn.Module) -> Callable[..., Any]:
    eager = block.forward
    compiled = torch.compile(eager, dynamic=False)

    def forward(*args: Any, **kwargs: Any) -> Any:
        return (compiled if torch.is_grad_enabled() else eager)(*args, **kwargs)

    return forward
