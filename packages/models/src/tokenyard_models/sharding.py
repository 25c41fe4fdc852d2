"""What a rank holds of a parameter."""

from __future__ import annotations

from torch import Tensor

from tokenyard.sharded import is_sharded


def own_part(parameter: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """Return what this rank holds of a parameter, and the index of its first element in the whole."""
    if not is_sharded(parameter):
        return parameter, (0,) * parameter.dim()
    (chunk,) = (
        parameter.__create_chunk_list__()
    )  # how torch's checkpoints ask a shard where it lies
    return parameter.to_local(), tuple(chunk.offsets)
