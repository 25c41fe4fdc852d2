"""Initial weights that do not depend on the layout.

The rows of a matrix (of the packed experts, the output rows of every expert) are drawn in stripes of some tens of
thousands of numbers, each by a generator of its own, seeded by a hash of (seed, parameter name, stripe). A rank that
holds some rows draws their stripes and no others, and the model is the same whatever the number of ranks.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor, nn

from tokenyard_models.sharding import own_part

_EMBEDDING_STD = 0.02
_THREADS = min(8, os.cpu_count() or 1)
_STRIPE = 1 << 16  # numbers that a generator draws
_SHARE = 32  # stripes that a thread draws at a time
_INTO_RESIDUAL = ("attention.out.weight", "ffn.experts.down", "ffn.shared.down", "ffn.down")
_ZERO = ("_bias", "adapter.up_b", "adapter.down_b")  # besides vectors that are no norm's
_WRAPPERS = (
    "_checkpoint_wrapped_module.",
    "_orig_mod.",
)  # what activation checkpointing and compilation put in names


@torch.no_grad()
def initialize(model: nn.Module, seed: int, layers: int) -> None:
    """Fill all parameters: matrices N(0, 1/fan in), embeddings N(0, 0.02^2), norms 1, biases 0, B of adapters 0.

    Buffers are 0. What writes into the residual stream is scaled by 1/sqrt(2 layers), as in GPT-2. Of a sharded
    parameter (DTensor) each rank fills its own shard.
    """
    for name, parameter in model.named_parameters():
        name = unwrapped(name)
        if parameter.dim() == 1 or name.endswith(_ZERO):
            parameter.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
        else:
            local, first = own_part(parameter)
            draw_rows(
                local, seed, name, _std(name, parameter.shape, layers), parameter.shape, first
            )
    for buffer in model.buffers():
        buffer.zero_()


def draw_rows(
    local: Tensor,
    seed: int,
    name: str,
    std: float,
    whole: Sequence[int] = (),
    first: Sequence[int] = (),
) -> None:
    """Fill `local`, a block of a parameter whose shape is `whole` (default: its own), with normal numbers.

    `first` is the index in the whole parameter of the block's first element (default: all zeros).
    """
    whole, first = tuple(whole) or tuple(local.shape), tuple(first) or (0,) * local.dim()
    total, width = math.prod(whole[:-1]), whole[-1]
    height = max(1, _STRIPE // width)
    columns = slice(first[-1], first[-1] + local.shape[-1])
    positions = _positions(local.shape, whole, first)
    rows = torch.empty(len(positions), local.shape[-1], dtype=torch.float32, device="cpu")

    def draw(stripes: list[tuple[int, Tensor, Tensor]]) -> None:
        generator, room = (
            torch.Generator(),
            torch.empty(height, width, dtype=torch.float32, device="cpu"),
        )
        for stripe, wanted, out in stripes:
            generator.manual_seed(_stripe_seed(seed, name, stripe))
            begin = stripe * height
            stands = room[: total - begin]
            if out.shape == stands.shape:
                out.normal_(0, std, generator=generator)
            else:
                out.copy_(stands.normal_(0, std, generator=generator)[wanted - begin, columns])

    numbers, counts = torch.unique_consecutive(positions // height, return_counts=True)
    shares = counts.tolist()
    stripes = list(zip(numbers.tolist(), positions.split(shares), rows.split(shares)))
    with ThreadPoolExecutor(_THREADS) as pool:  # torch lets go of the interpreter while it draws
        list(
            pool.map(
                draw, (stripes[begin : begin + _SHARE] for begin in range(0, len(stripes), _SHARE))
            )
        )
    local.copy_(rows.view(local.shape))


def _positions(block: Sequence[int], whole: Sequence[int], first: Sequence[int]) -> Tensor:
    """Return the index, among all rows of a parameter, of each row of a block of it, ascending."""
    positions = torch.zeros((), dtype=torch.int64, device="cpu")
    for count, size, start in zip(block[:-1], whole, first):
        positions = positions.unsqueeze(-1) * size + torch.arange(
            start, start + count, device="cpu"
        )
    return positions.flatten()


def unwrapped(name: str) -> str:
    """Return a parameter's name without what activation checkpointing and compilation put into it."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def _stripe_seed(seed: int, name: str, stripe: int) -> int:
    digest = hashlib.blake2b(f"{seed}/{name}/{stripe}".encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> 1


def _std(name: str, shape: Sequence[int], layers: int) -> float:
    if name in ("embed.weight", "positions.weight"):
        return _EMBEDDING_STD
    std = 1 / math.sqrt(shape[-1])
    return std / math.sqrt(2 * layers) if name.endswith(_INTO_RESIDUAL) else std
