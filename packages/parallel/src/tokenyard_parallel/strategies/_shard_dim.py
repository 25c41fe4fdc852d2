"""Which dimension of a parameter is cut into shards.

torch cuts the first dimension and leaves ranks empty where there are fewer rows than ranks. Packed experts have few
rows, one for each expert, and nearly all the numbers of a model: where the experts of a rank cannot be shared out
evenly, their own rows or columns are cut instead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from tokenyard import ConfigError, MoE
from tokenyard_parallel.meshes import Sizes, dense_sizes, divisors, expert_sizes


def expert_dim(shape: Sequence[int], shards: int) -> int | None:
    """Return the dimension of packed experts [E, ...] that is cut into `shards`; None if that would leave one empty.

    The first that `shards` divide; else experts, if the last shard gets some: torch gives each the same, rounded up.
    """
    even = [dim for dim, size in enumerate(shape) if size % shards == 0]
    if even:
        return even[0]
    return 0 if -(-shape[0] // shards) * (shards - 1) < shape[0] else None


def cut_experts(shards: int) -> Callable[[nn.Parameter], Shard]:
    """Return what tells torch where to cut each parameter of packed experts."""

    def place(parameter: nn.Parameter) -> Shard:
        dim = expert_dim(local(parameter).shape, shards)
        if dim is None:
            raise ConfigError(
                f"experts {list(parameter.shape)} cannot be cut into {shards} shards; see `unusable`"
            )
        return Shard(dim)

    return place


def local(tensor: Tensor) -> Tensor:
    """Return what this rank holds of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def refuse_uncut(moe: MoE, dense: Sizes, experts: Sizes) -> None:
    """Raise ConfigError if some rank would hold nothing of a parameter of the experts, saying what would do.

    `dense` and `experts` are the meshes of all other parameters, and of the experts.
    """
    if (name := _uncut(moe, experts)) is None:
        return
    degrees = [d for d in divisors(moe.workload.num_experts) if _fits(moe, dense, d)]
    ranks, degree = dense.replicate * dense.shard, experts.expert_parallel
    copies = [r for r in divisors(ranks) if _fits(moe, dense_sizes(ranks, r), degree)]
    what, values = ("expert_parallel", degrees) if degrees else ("replicate", copies)
    raise ConfigError(
        f"{name} cannot be cut into {experts.shard} equal shards along any dimension; {what} "
        f"{', '.join(map(str, values))} would do"
    )


def _fits(moe: MoE, dense: Sizes, expert_parallel: int) -> bool:
    try:
        return _uncut(moe, expert_sizes(dense, expert_parallel)) is None
    except ConfigError:
        return False


def _uncut(moe: MoE, sizes: Sizes) -> str | None:
    """Name a parameter of the experts that cannot be cut, with its shape on a rank; None if all can."""
    for name, parameter in moe.experts.named_parameters():
        shape = (parameter.shape[0] // sizes.expert_parallel, *parameter.shape[1:])
        if expert_dim(shape, sizes.shard) is None:
            return f"experts.{name} {list(shape)}"
    return None
