"""Draw normal numbers for a parameter that do not depend on its sharding.

The rows of a matrix (for packed experts, the output rows of every expert) are drawn in stripes of
some tens of thousands of numbers. Each stripe has its own generator, seeded by a hash of (seed,
parameter name, stripe). A rank draws only the stripes of its rows, so the numbers are the same for
any number of ranks.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from tokenyard.sharded import local_shard

_THREADS = min(8, os.cpu_count() or 1)
_STRIPE = 1 << 16  # numbers for each generator
_STRIPES_PER_TASK = 32  # for each call in a thread

# Parts that activation checkpointing and torch.compile add to parameter names.
_WRAPPERS = ("_checkpoint_wrapped_module.", "_orig_mod.")

_on_device: ContextVar[bool] = ContextVar("tokenyard_draws_on_device", default=False)


@contextmanager
def draws_on_device() -> Iterator[None]:
    """Context: `draw_normal` draws on the parameter's device, in its dtype.

    A GPU then fills a model in seconds that the CPU would take minutes for. The numbers depend on
    the device and on the sharding: for benchmarks only.
    """
    token = _on_device.set(True)
    try:
        yield
    finally:
        _on_device.reset(token)


@torch.no_grad()
def draw_normal(parameter: Tensor, seed: int, name: str, std: float) -> None:
    """Fill a parameter with numbers from N(0, std^2), the same for every sharding of it.

    `name` is the parameter's name in the model. Each rank fills its shard. Numbers are drawn in
    float32 on the CPU, unless within `draws_on_device`.
    """
    shard, offsets = local_shard(parameter)
    if _on_device.get():
        generator = torch.Generator(shard.device)
        generator.manual_seed(_stripe_seed(seed, unwrapped(name), 0))
        shard.normal_(0, std, generator=generator)
        return
    draw_rows(shard, seed, unwrapped(name), std, parameter.shape, offsets)


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
    stripes = list(_stripes(rows, row_positions(local.shape, shape, offsets), draw.height))
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


def row_positions(block: Sequence[int], whole: Sequence[int], first: Sequence[int]) -> Tensor:
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
