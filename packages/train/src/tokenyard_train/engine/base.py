"""The base of adapters: the frozen weights, and a digest by which a checkpoint names them.

A checkpoint of a LoRA run holds adapters, other trained parameters and their optimizer states. It
names the base by its path and by a digest of its numbers. The digest is the same in every layout
and precision.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn

from tokenyard import started_processes
from tokenyard.draw import row_positions, unwrapped
from tokenyard.sharded import local_shard
from tokenyard_models.hf import PeftFolder, WeightsError
from tokenyard_train.distributed import map_over_ranks

_CHUNK = 1 << 21  # numbers that are digested at a time
_MIX = (0x9E3779B97F4A7C15 - (1 << 64), 0x3F58476D1CE4E5B9)  # odd, as in splitmix64
_WORD = (1 << 64) - 1


def base_digest(model: nn.Module) -> str:
    """Return a digest of the names, shapes and numbers of all frozen parameters.

    All ranks of a run call it.
    """
    return _digest({n: p for n, p in model.named_parameters() if not p.requires_grad})


def check_peft_base(model: nn.Module, adapters: PeftFolder, base: str) -> None:
    """Raise WeightsError unless a model has the weights that PEFT's adapters were trained on.

    `base` names where its weights are from. A folder that PEFT wrote does not tell, and passes.
    """
    trained = adapters.base_digest
    if trained is None:
        return
    if trained != _digest({n: p for n, p in model.named_parameters() if ".adapter." not in n}):
        raise WeightsError(
            f"{adapters.path} holds adapters of a base with other weights than {base} has; give "
            "the base that they were trained on"
        )


def _digest(parameters: Mapping[str, Tensor]) -> str:
    """Return a digest of parameters by name.

    Numbers count as rounded to bfloat16. Each parameter has the sum of its numbers' bits,
    multiplied by a hash of their positions, modulo 2^64: shards can be summed.
    """
    shards: dict[str, int] = {}
    for name, parameter in ((unwrapped(n), p) for n, p in parameters.items()):
        shard, first = local_shard(parameter.detach())
        if shard.numel():
            # replicas of a shard have the same key, so they count once
            key = f"{name} {list(parameter.shape)}/{list(first)}"
            shards[key] = _sum(shard, parameter.shape, first)
    everywhere: dict[str, int] = {}
    for of_rank in map_over_ranks(lambda _: shards, range(started_processes())):
        everywhere |= cast("dict[str, int]", of_rank)
    sums: dict[str, int] = {}
    for key, value in everywhere.items():
        name = key.rpartition("/")[0]
        sums[name] = (sums.get(name, 0) + value) & _WORD
    text = "\n".join(f"{name} {value}" for name, value in sorted(sums.items()))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _sum(shard: Tensor, whole: torch.Size, first: tuple[int, ...]) -> int:
    """Return the sum of one shard, which begins at the index `first` of the whole parameter."""
    width = shard.shape[-1]
    rows = shard.reshape(-1, width)
    numbers = row_positions(shard.shape, whole, first) * whole[-1] + first[-1]
    height = max(1, _CHUNK // width)
    total = torch.zeros((), dtype=torch.int64, device=shard.device)
    columns = torch.arange(width, device=shard.device)
    for chunk, starts in zip(rows.split(height), numbers.split(height)):
        factor = (starts.to(shard.device).unsqueeze(1) + columns) * _MIX[0]
        factor = (factor ^ (factor >> 29)) * _MIX[1] | 1
        total += (chunk.bfloat16().view(torch.int16) * factor).sum()
    return int(total) & _WORD
