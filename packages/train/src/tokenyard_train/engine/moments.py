"""Moments of an optimizer in float32, in bfloat16, or in 8 bits.

With 8 bits, blocks of a row are scaled by their largest number and stored in the dynamic map of
Dettmers et al. 2021 (arXiv 2110.02861): 7 decades below 1, finer towards 1. A block never crosses a
row, so shards of whole rows hold whole blocks, and a checkpoint loads in every layout of this kind.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

import torch
from torch import Tensor

from tokenyard import ConfigError
from tokenyard.sharded import is_sharded, local_part

SCALE = "_scale"
"""Suffix of the name of a moment's scales [..., columns / block], float32."""

_BLOCK = 256  # numbers with one scale, at most
_SMALLEST_BLOCK = 64  # of a smaller block, scales would take as much as they save
_DECADES = 7
_UNSIGNED = "exp_avg_sq"  # the moment that is never negative

State = Mapping[str, Tensor]


def block_size(parameter: Tensor) -> int | None:
    """Return how many moments share a scale; None if a parameter's moments stay in float32.

    This is the largest power of two that divides the rows, at most 256. Parameters of one
    dimension, and those with shorter blocks than 64, have moments in float32.
    """
    columns = parameter.shape[-1] if parameter.dim() > 1 else 1
    block = min(_BLOCK, columns & -columns)
    return block if block >= _SMALLEST_BLOCK else None


def check_blocks(name: str, parameter: Tensor) -> None:
    """Raise ConfigError if a parameter is cut inside of blocks."""
    block = block_size(parameter)
    columns = local_part(parameter).shape[-1]
    if block is not None and columns % block:
        raise ConfigError(
            f"optimizer.moments is 8bit, whose blocks have {block} numbers of a row, and {name} is "
            f"cut into shards of {columns} columns; give bf16, or parallel.expert_parallel so that "
            "shards have whole rows"
        )


def new_moment(name: str, parameter: Tensor, stored: str) -> dict[str, Tensor]:
    """Return a moment of zero and, with 8 bits, its scales. `stored` is ``optimizer.moments``."""
    block = block_size(parameter)
    if stored == "bf16":
        return {name: _zeros(parameter, torch.bfloat16)}
    if stored == "fp32" or block is None:
        # `check` builds the optimizer of weights that are in 16 bits already
        return {name: _zeros(parameter, torch.promote_types(parameter.dtype, torch.float32))}
    codes = _zeros(parameter, torch.uint8)
    return {name: codes, name + SCALE: _scales(parameter.detach(), block)}


def _zeros(parameter: Tensor, dtype: torch.dtype) -> Tensor:
    """Return zeros, laid out like a parameter."""
    if parameter.is_meta and not is_sharded(parameter):
        # zeros_like would import torch's symbolic shapes, which takes a second
        return torch.zeros(parameter.shape, dtype=dtype, device="meta")
    return torch.zeros_like(parameter.detach(), dtype=dtype)


def _scales(parameter: Tensor, block: int) -> Tensor:
    """Return zeros [..., columns / block], laid out like the parameter."""
    local = local_part(parameter)
    shape = (*local.shape[:-1], local.shape[-1] // block)
    scales = torch.zeros(shape, dtype=torch.float32, device=parameter.device)
    if not is_sharded(parameter):
        return scales
    whole = torch.empty(*parameter.shape[:-1], parameter.shape[-1] // block, device="meta")
    return type(parameter).from_local(
        scales,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=whole.shape,
        stride=whole.stride(),
    )


def read_moment(state: State, name: str) -> Tensor:
    """Return this rank's part of a moment: the stored tensor, or a new float32 one."""
    stored = local_part(state[name])
    if stored.dtype == torch.bfloat16:
        return stored.float()
    if name + SCALE not in state:
        return stored
    scales = local_part(state[name + SCALE])  # [..., columns / block]
    values = _values(name != _UNSIGNED, stored.device)[stored.int()]
    return (values.view(*scales.shape, -1) * scales.unsqueeze(-1)).view(stored.shape)


def write_moment(state: State, name: str, value: Tensor, valid: Tensor | None = None) -> None:
    """Store what `read_moment` returned, after it changed. If `valid` is false, store nothing."""
    stored = local_part(state[name])
    if name + SCALE not in state:
        if stored is not value and stored.numel():
            stored.copy_(value)
        return
    scales = local_part(state[name + SCALE])
    codes, new_scales = quantize(value.view(*scales.shape, -1), signed=name != _UNSIGNED)
    for old, new in ((stored, codes.view(stored.shape)), (scales, new_scales)):
        old.copy_(new if valid is None else torch.where(valid, new, old))


def quantize(x: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """Return codes uint8 [..., block] and scales float32 [...] of blocks x [..., block].

    A code is the index of the nearest value. Of signed ones, the highest bit is the sign; the code
    128 is 1. Without a sign, a number above 0 is never stored as 0: a step divides by it.
    """
    x = x.float()
    scales = x.abs().amax(-1)
    y = x / scales.where(scales > 0, 1.0).unsqueeze(-1)
    index = torch.bucketize(y.abs(), _middles(signed, x.device), out_int32=True)
    if signed:
        below = index.clamp(max=127)
        index = torch.where(y < 0, below + 128 * (below > 0), index)
    else:
        index = index.clamp(min=1).where(y > 0, 0)
    return index.to(torch.uint8), scales


def _magnitudes(signed: bool) -> Tensor:
    """Return the values of the dynamic map that are not negative, ascending, in float64."""
    decades = [torch.zeros(1, dtype=torch.float64)]
    for decade in range(_DECADES):
        count = 2 ** (decade + (not signed))
        middles = (torch.arange(count, dtype=torch.float64) + 0.5) / count
        decades.append(10.0 ** (decade + 1 - _DECADES) * (0.1 + 0.9 * middles))
    return torch.cat([*decades, torch.ones(1, dtype=torch.float64)])


@cache
def _values(signed: bool, device: torch.device) -> Tensor:
    """Return the value of each code [256], in float32."""
    values = _magnitudes(signed)
    if signed:
        values = torch.cat([values, -values[1:128]])
    return values.to(device, torch.float32)


@cache
def _middles(signed: bool, device: torch.device) -> Tensor:
    """Return the middles between neighbouring magnitudes, in float32."""
    values = _magnitudes(signed)
    return ((values[1:] + values[:-1]) / 2).to(device, torch.float32)
