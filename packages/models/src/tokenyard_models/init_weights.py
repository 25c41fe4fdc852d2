"""Draw initial weights that do not depend on the sharding.

The rows of a matrix (for packed experts, the output rows of every expert) are drawn in stripes of
some tens of thousands of numbers. Each stripe has its own generator, seeded by a hash of (seed,
parameter name, stripe). A rank draws only the stripes of its rows, so the model is the same for any
number of ranks.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tokenyard_models.sharding import local_shard

_EMBEDDING_STD = 0.02
_THREADS = min(8, os.cpu_count() or 1)
_STRIPE = 1 << 16  # numbers for each generator
_STRIPES_PER_TASK = 32  # for each call in a thread
_INTO_RESIDUAL = ("attention.out.weight", "ffn.experts.down", "ffn.shared.down", "ffn.down")
_ZERO = ("_bias", "adapter.up_b", "adapter.down_b")  # besides vectors that are not of a norm

# Parts that activation checkpointing and torch.compile add to parameter names.
_WRAPPERS = ("_checkpoint_wrapped_module.", "_orig_mod.")


@torch.no_grad()
def initialize(model: nn.Module, seed: int, layers: int) -> None:
    """Fill all parameters and buffers with their initial values.

    Matrices are N(0, 1/fan-in), embeddings N(0, 0.02^2), norms 1; biases, buffers and the B matrix
    of adapters are 0. Matrices that write into the residual stream are scaled by 1/sqrt(2 layers),
    as in GPT-2. Of a sharded parameter (DTensor), each rank fills its own shard.
    """
    for wrapped_name, parameter in model.named_parameters():
        name = unwrapped(wrapped_name)
        if parameter.dim() == 1 or name.endswith(_ZERO):
            parameter.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
        else:
            shard, offsets = local_shard(parameter)
            std = _std(name, parameter.shape, layers)
            draw_rows(shard, seed, name, std, parameter.shape, offsets)
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
    """Fill `local`, a block of a parameter, with normal numbers.

    `whole` is the shape of the parameter (default: that of `local`). `first` is the index of the
    block's first element in the parameter (default: all zeros).
    """
    shape = tuple(whole) or tuple(local.shape)
    offsets = tuple(first) or (0,) * local.dim()
    rows = torch.empty(
        math.prod(local.shape[:-1]), local.shape[-1], dtype=torch.float32, device="cpu"
    )
    draw = _StripeDraw(
        seed, name, std, shape, columns=slice(offsets[-1], offsets[-1] + local.shape[-1])
    )
    stripes = list(_stripes(rows, _positions(local.shape, shape, offsets), draw.height))
    tasks = [
        stripes[begin : begin + _STRIPES_PER_TASK]
        for begin in range(0, len(stripes), _STRIPES_PER_TASK)
    ]
    with ThreadPoolExecutor(_THREADS) as pool:  # torch releases the GIL while it draws
        list(pool.map(draw, tasks))
    local.copy_(rows.view(local.shape))


class _Stripe(NamedTuple):
    """The rows of a block that one generator draws."""

    number: int
    positions: Tensor  # [rows] among all rows of the parameter
    out: Tensor  # [rows, columns of the block], a view


def _stripes(rows: Tensor, positions: Tensor, height: int) -> Iterator[_Stripe]:
    """Split the rows of a block, at ascending positions, into stripes of `height` positions."""
    numbers, counts = torch.unique_consecutive(positions // height, return_counts=True)
    sizes = counts.tolist()
    for stripe in zip(numbers.tolist(), positions.split(sizes), rows.split(sizes)):
        yield _Stripe(*stripe)


@dataclass(frozen=True)
class _StripeDraw:
    """Draws stripes of a parameter, each by its own generator."""

    seed: int
    name: str
    std: float
    shape: tuple[int, ...]  # of the whole parameter
    columns: slice  # of the block

    @property
    def height(self) -> int:
        """Return the number of rows of a stripe."""
        return max(1, _STRIPE // self.shape[-1])

    def __call__(self, stripes: Sequence[_Stripe]) -> None:
        """Fill the stripes' rows. Runs in a thread."""
        total = math.prod(self.shape[:-1])
        generator = torch.Generator()
        buffer = torch.empty(self.height, self.shape[-1], dtype=torch.float32, device="cpu")
        for number, positions, out in stripes:
            generator.manual_seed(_stripe_seed(self.seed, self.name, number))
            begin = number * self.height
            whole_stripe = buffer[: total - begin]
            if out.shape == whole_stripe.shape:
                out.normal_(0, self.std, generator=generator)
            else:
                whole_stripe.normal_(0, self.std, generator=generator)
                out.copy_(whole_stripe[positions - begin, self.columns])


def _positions(block: Sequence[int], whole: Sequence[int], first: Sequence[int]) -> Tensor:
    """Return the index of each row of a block among all rows of the parameter, ascending."""
    positions = torch.zeros((), dtype=torch.int64, device="cpu")
    for count, size, start in zip(block[:-1], whole, first):
        steps = torch.arange(start, start + count, device="cpu")
        positions = positions.unsqueeze(-1) * size + steps
    return positions.flatten()


def unwrapped(name: str) -> str:
    """Remove what activation checkpointing and torch.compile add to a parameter's name."""
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
