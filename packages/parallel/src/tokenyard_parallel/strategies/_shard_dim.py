"""The dimension along which a parameter is sharded.

torch shards dimension 0, and leaves ranks empty if it has fewer rows than ranks. Packed experts
have one row for each expert and nearly all numbers of a model. If the experts of a rank cannot be
sharded evenly, another dimension of them is sharded instead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn
from torch.distributed.tensor import Shard

from tokenyard import ConfigError, MoE
from tokenyard.divisors import divisors
from tokenyard.sharded import local_part
from tokenyard_parallel.meshes import MeshSizes, dense_sizes, expert_sizes


def expert_shard_dim(shape: Sequence[int], shards: int) -> int | None:
    """Return the dimension of packed experts [E, ...] to shard; None if a shard would be empty.

    This is the first dimension that `shards` divides. Without one it is dimension 0, if the last
    shard gets an expert: torch gives every shard but the last the same number, rounded up.
    """
    even = [dim for dim, size in enumerate(shape) if size % shards == 0]
    if even:
        return even[0]
    rows_per_shard = -(-shape[0] // shards)
    return 0 if rows_per_shard * (shards - 1) < shape[0] else None


def expert_placement(shards: int) -> Callable[[nn.Parameter], Shard]:
    """Return FSDP's `shard_placement_fn` for packed experts."""

    def placement(parameter: nn.Parameter) -> Shard:
        dim = expert_shard_dim(local_part(parameter).shape, shards)
        if dim is None:
            raise ConfigError(
                f"experts {list(parameter.shape)} cannot be cut into {shards} shards; "
                "see `unusable`"
            )
        return Shard(dim)

    return placement


def cut_evenly_into_experts(experts: nn.Module, shards: int) -> list[str]:
    """Return the names of packed experts [E, ...] whose shards are E / shards experts each."""
    return [
        name
        for name, parameter in experts.named_parameters()
        if local_part(parameter).shape[0] % shards == 0
    ]


def check_shardable(moe: MoE, dense: MeshSizes, experts: MeshSizes) -> None:
    """Check that every rank holds a part of every expert parameter.

    `dense` and `experts` are the mesh sizes of the dense parameters and of the experts.
    Raises ConfigError, with the values that would work, if a rank would hold nothing.
    """
    name = _unshardable(moe, experts)
    if name is None:
        return
    key = "expert_parallel"
    values = [degree for degree in divisors(moe.workload.num_experts) if _fits(moe, dense, degree)]
    if not values:
        ranks = dense.replicate * dense.shard
        key = "replicate"
        values = [
            replicas
            for replicas in divisors(ranks)
            if _fits(moe, dense_sizes(ranks, replicas), experts.expert_parallel)
        ]
    raise ConfigError(
        f"{name} cannot be cut into {experts.shard} equal shards along any dimension; {key} "
        f"{', '.join(map(str, values))} would do"
    )


def _fits(moe: MoE, dense: MeshSizes, expert_parallel: int) -> bool:
    try:
        return _unshardable(moe, expert_sizes(dense, expert_parallel)) is None
    except ConfigError:
        return False


def _unshardable(moe: MoE, sizes: MeshSizes) -> str | None:
    """Return the name and local shape of an expert parameter that cannot be sharded."""
    for name, parameter in moe.experts.named_parameters():
        shape = (parameter.shape[0] // sizes.expert_parallel, *parameter.shape[1:])
        if expert_shard_dim(shape, sizes.shard) is None:
            return f"experts.{name} {list(shape)}"
    return None
