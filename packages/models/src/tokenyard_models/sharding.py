"""Access this rank's shard of a parameter."""

from __future__ import annotations

from torch import Tensor

from tokenyard.sharded import is_sharded


def local_shard(parameter: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """Return this rank's shard and the index of its first element in the whole parameter."""
    if not is_sharded(parameter):
        return parameter, (0,) * parameter.dim()
    (chunk,) = parameter.__create_chunk_list__()  # the API that torch's checkpoints use
    return parameter.to_local(), tuple(chunk.offsets)
