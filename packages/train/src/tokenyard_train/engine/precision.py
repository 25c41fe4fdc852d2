"""The precisions that a config offers, and computing in them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from tokenyard import moe_layers
from tokenyard.errors import one_of
from tokenyard.sharded import is_sharded

AMP_BF16 = "amp_bf16"
"""The precision with float32 weights, which autocast converts to bfloat16."""

BF16_MASTER = "bf16_master"
"""The precision with weights and activations in bfloat16, and float32 masters."""

COMPUTE_DTYPES = {"fp32": torch.float32, AMP_BF16: torch.bfloat16, BF16_MASTER: torch.bfloat16}
"""Precision -> the dtype of matmuls. Weights are float32 in the first two."""


def narrow(model: nn.Module) -> None:
    """Convert all parameters of a model to bfloat16. Buffers keep their dtype."""
    model._apply(lambda t: t.to(torch.bfloat16) if isinstance(t, nn.Parameter) else t)


def narrow_frozen(model: nn.Module) -> None:
    """Convert the frozen parameters of a model on the meta device to bfloat16.

    Unlike those of `narrow`, they never take the memory of float32.
    """
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)


def narrow_experts(model: nn.Module) -> None:
    """Convert the weights of a model's experts to bfloat16, as autocast does in each pass.

    They compute the same then, and kernels can keep what they compute from these weights. Sharded
    weights and adapters keep their dtype.
    """
    for moe in moe_layers(model):
        for parameter in moe.experts.parameters(recurse=False):
            if not is_sharded(parameter):
                parameter.data = parameter.data.to(torch.bfloat16)


@contextmanager
def computing_in(precision: str, device: torch.device) -> Iterator[None]:
    """Compute in a precision: autocast to bfloat16 for ``amp_bf16``, no autocast for any other."""
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == AMP_BF16):
        yield


def check_precision(precision: str, option: str) -> None:
    """Raise ConfigError, naming the option, for a precision that is not offered."""
    one_of(option, precision, COMPUTE_DTYPES)
