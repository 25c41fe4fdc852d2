"""Device meshes over the ranks of a run: one for the dense parameters, one for the experts."""

from __future__ import annotations

from datetime import timedelta
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from tokenyard import ConfigError
from tokenyard.divisors import divisors
from tokenyard.sharded import is_sharded
from tokenyard_parallel._torch_private import set_timeout

REPLICATE = "replicate"
SHARD = "shard"
EXPERT_PARALLEL = "expert_parallel"


class MeshSizes(NamedTuple):
    """Mesh sizes: replicas, shards per replica, expert-parallel ranks."""

    replicate: int
    shard: int
    expert_parallel: int = 1


def dense_sizes(ranks: int, replicate: int) -> MeshSizes:
    """Return the mesh sizes of the dense parameters: all parameters but those of the experts.

    Raises ConfigError, with the divisors that would work, if `replicate` does not divide the ranks.
    """
    if replicate < 1 or ranks % replicate:
        fitting = ", ".join(map(str, divisors(ranks)))
        raise ConfigError(
            f"replicate is {replicate}, which does not divide the {ranks} ranks; "
            f"these do: {fitting}"
        )
    return MeshSizes(replicate, ranks // replicate)


def expert_sizes(dense: MeshSizes, expert_parallel: int) -> MeshSizes:
    """Return the mesh sizes of the experts.

    Expert-parallel ranks replace shards, or replicas if there is one shard.

    Raises ConfigError, with the degrees that would work, if `expert_parallel` does not divide them.
    """
    ranks = dense.shard if dense.shard > 1 else dense.replicate
    if ranks % expert_parallel:
        fitting = ", ".join(map(str, divisors(ranks)))
        raise ConfigError(
            f"expert_parallel is {expert_parallel}, which does not divide the {ranks} ranks "
            f"of a copy of the model; these do: {fitting}"
        )
    if dense.shard > 1:
        return MeshSizes(dense.replicate, ranks // expert_parallel, expert_parallel)
    return MeshSizes(ranks // expert_parallel, 1, expert_parallel)


def make_mesh(sizes: MeshSizes, device: torch.device, timeout: timedelta) -> DeviceMesh:
    """Return the mesh of all ranks; expert-parallel ranks are neighbours.

    A mesh has its own process groups, with threads and buffers for each, so equal sizes share one
    mesh. `timeout` is how long a collective in any of its groups may take.
    """
    mesh = _cached_mesh(dist.group.WORLD, sizes, _mesh_device_type(device))
    for group in mesh.get_all_groups():
        set_timeout(group, timeout)
    return mesh


def _mesh_device_type(device: torch.device) -> str:
    """Return the type of a mesh's device: "cpu" for a plan whose GPUs another machine has."""
    return device.type if torch.cuda.is_available() else "cpu"


@lru_cache(maxsize=16)
def _cached_mesh(world: object, sizes: MeshSizes, device_type: str) -> DeviceMesh:
    names = (REPLICATE, SHARD, EXPERT_PARALLEL)
    return init_device_mesh(device_type, tuple(sizes), mesh_dim_names=names)


def data_mesh(mesh: DeviceMesh) -> DeviceMesh:
    """Return the part of a mesh that FSDP uses: its shards, and its replicas if there are any."""
    return mesh[SHARD] if mesh[REPLICATE].size() == 1 else mesh[REPLICATE, SHARD]


def rank_and_size() -> tuple[int, int]:
    """Return this rank and the world size."""
    return dist.get_rank(), dist.get_world_size()


def is_shard(parameter: Tensor) -> bool:
    """Return whether a parameter is a shard, and not what FSDP has gathered."""
    return is_sharded(parameter) and SHARD in (parameter.device_mesh.mesh_dim_names or ())
