"""The processes of a run as meshes: one for what every rank computes with, one for experts."""

from __future__ import annotations

from datetime import timedelta
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import _set_pg_timeout

from tokenyard import ConfigError

REPLICATE, SHARD, EXPERT_PARALLEL = "replicate", "shard", "expert_parallel"


class Sizes(NamedTuple):
    """How many ranks hold copies of a parameter, shards of each copy, and, of experts, different ones."""

    replicate: int
    shard: int
    expert_parallel: int = 1


def divisors(number: int) -> list[int]:
    """List the divisors of a number, ascending."""
    return [n for n in range(1, number + 1) if number % n == 0]


def dense_sizes(ranks: int, replicate: int) -> Sizes:
    """Return the mesh of all parameters but the experts'. Raises ConfigError if the copies do not share the ranks."""
    if replicate < 1 or ranks % replicate:
        fitting = ", ".join(map(str, divisors(ranks)))
        raise ConfigError(
            f"replicate is {replicate}, which does not divide the {ranks} processes; these do: {fitting}"
        )
    return Sizes(replicate, ranks // replicate)


def expert_sizes(dense: Sizes, expert_parallel: int) -> Sizes:
    """Return the mesh of the experts: expert parallelism takes the place of shards, or, if there are none, of copies.

    Raises ConfigError, with the degrees that would do, if it cannot.
    """
    room = dense.shard if dense.shard > 1 else dense.replicate
    if room % expert_parallel:
        fitting = ", ".join(map(str, divisors(room)))
        raise ConfigError(
            f"expert_parallel is {expert_parallel}, which does not divide the {room} processes of a copy of the model; "
            f"these do: {fitting}"
        )
    if dense.shard > 1:
        return Sizes(dense.replicate, room // expert_parallel, expert_parallel)
    return Sizes(room // expert_parallel, 1, expert_parallel)


def make_mesh(sizes: Sizes, device: torch.device, timeout: timedelta) -> DeviceMesh:
    """Return the mesh of all processes, expert parallelism innermost, so that its ranks are neighbours.

    Each mesh has process groups of its own, with threads or buffers for each, so one serves all who ask for its sizes.
    `timeout` is how long a collective of any of them may take.
    """
    mesh = _mesh_of(dist.group.WORLD, sizes, device.type)
    for group in mesh.get_all_groups():
        if dist.get_backend(group) in ("gloo", "nccl"):
            _set_pg_timeout(
                timeout, group
            )  # torch gives a mesh's groups half an hour, whatever that of all was given
    return mesh


@lru_cache(maxsize=16)
def _mesh_of(world: object, sizes: Sizes, device_type: str) -> DeviceMesh:
    return init_device_mesh(
        device_type, tuple(sizes), mesh_dim_names=(REPLICATE, SHARD, EXPERT_PARALLEL)
    )


def data_mesh(mesh: DeviceMesh) -> DeviceMesh:
    """Return the part of a mesh that FSDP lays parameters out over: its shards, and its copies if there are any."""
    return mesh[SHARD] if mesh[REPLICATE].size() == 1 else mesh[REPLICATE, SHARD]


def place() -> tuple[int, int]:
    """Return this process's rank and how many there are."""
    return dist.get_rank(), dist.get_world_size()
