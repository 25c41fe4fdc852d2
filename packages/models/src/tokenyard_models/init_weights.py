"""Initial weights that do not depend on the sharding."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import torch
from torch import nn

from tokenyard.draw import draw_normal, unwrapped

_EMBEDDING_STD = 0.02
_INTO_RESIDUAL = ("attention.out.weight", "ffn.experts.down", "ffn.shared.down", "ffn.down")
_ADAPTER_B = re.compile(r"\.adapter\.\w+_b$")


@torch.no_grad()
def initialize(model: nn.Module, seed: int, layers: int) -> None:
    """Fill all parameters and buffers with their initial values.

    Matrices are N(0, 1/fan-in), embeddings N(0, 0.02^2), norms 1; biases, buffers and the B matrix
    of adapters are 0. Matrices that write into the residual stream are scaled by 1/sqrt(2 layers),
    as in GPT-2. Of a sharded parameter (DTensor), each rank fills its own shard.
    """
    for wrapped_name, parameter in model.named_parameters():
        name = unwrapped(wrapped_name)
        if parameter.dim() == 1 or name.endswith("_bias") or _ADAPTER_B.search(name):
            parameter.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
        else:
            draw_normal(parameter, seed, name, _std(name, parameter.shape, layers))
    for buffer in model.buffers():
        buffer.zero_()


def _std(name: str, shape: Sequence[int], layers: int) -> float:
    if name in ("embed.weight", "positions.weight"):
        return _EMBEDDING_STD
    std = 1 / math.sqrt(shape[-1])
    return std / math.sqrt(2 * layers) if name.endswith(_INTO_RESIDUAL) else std
