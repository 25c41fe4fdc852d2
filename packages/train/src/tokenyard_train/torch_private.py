"""Private names of torch that this package uses; a test calls each function.

Each function names the torch versions that have the private name.
"""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d

from tokenyard.sharded import local_part

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def keep_compiler_out_of_optimizers() -> None:
    """Let an optimizer be constructed without importing ``torch._dynamo``, which takes 1 second.

    torch 2.10 to 2.13; has no effect in versions without the wrapper.

    ``torch._disable_dynamo`` wraps the optimizer's methods. The first call imports the compiler to
    keep the method out of compiled graphs. This package never compiles an optimizer, so each
    wrapper is marked as done.
    """
    for name in ("add_param_group", "zero_grad"):
        method = getattr(getattr(torch.optim.Optimizer, name), "__wrapped__", None)
        if method is not None and not hasattr(method, "__dynamo_disable"):
            setattr(method, "__dynamo_disable", method)


def fused_adamw(
    weights: list[Tensor],
    gradients: list[Tensor],
    states: list[dict[str, Tensor]],
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """Update plain tensors as ``torch.optim.AdamW(fused=True)`` does.

    `states` are those of the optimizer. Their tensors may be sharded. torch 2.10 to 2.13.
    """
    steps = [state["step"] for state in states]
    beta1, beta2 = betas
    torch._foreach_add_(steps, 1)
    torch._fused_adamw_(
        weights,
        gradients,
        [local_part(state["exp_avg"]) for state in states],
        [local_part(state["exp_avg_sq"]) for state in states],
        [],
        steps,
        lr=lr,
        beta1=beta1,
        beta2=beta2,
        weight_decay=weight_decay,
        eps=eps,
        amsgrad=False,
        maximize=False,
    )


def copy_default_timeout(group: dist.ProcessGroup) -> None:
    """Give a process group the collective timeout of the default group.

    torch 2.10 to 2.13. ``dist.new_group`` uses half an hour otherwise.
    """
    public = getattr(dist, "set_timeout", None)  # torch 2.14 and later
    (public or distributed_c10d._set_pg_timeout)(default_timeout(), group)


def default_timeout() -> timedelta:
    """Return the collective timeout of the default process group. torch 2.10 to 2.13."""
    world = dist.group.WORLD
    assert world is not None
    device = torch.device("cuda" if dist.get_backend(world) == "nccl" else "cpu")
    timeout: timedelta = world._get_backend(device).options._timeout
    return timeout


def set_nccl_timeouts(timeout: timedelta) -> None:
    """Set the collective timeout of all NCCL groups that exist. torch 2.10 to 2.13."""
    public = getattr(dist, "set_timeout", None)  # torch 2.14 and later
    for group in distributed_c10d._world.pg_map:
        if dist.get_backend(group) == "nccl":
            (public or distributed_c10d._set_pg_timeout)(timeout, group)


def flight_record() -> str:
    """Return torch's record of the last collectives as JSON: {"entries": [...], ...}.

    torch 2.10 to 2.13. A build without NCCL records gloo's. The environment variable
    TORCH_FR_BUFFER_SIZE is the number of entries; 0 turns the record off.
    """
    c10d = torch._C._distributed_c10d
    names = ("_dump_nccl_trace_json", "_dump_fr_trace_json")
    dump = next(getattr(c10d, name) for name in names if hasattr(c10d, name))
    text: str | bytes = dump(includeCollectives=True)
    return text.decode() if isinstance(text, bytes) else text


class HostShard(Tensor):
    """A host copy of this rank's shard, with the methods that DCP calls on a sharded tensor."""

    _items: list[Any]

    def __create_write_items__(self, fqn: str, object: Any) -> list[Any]:
        """Return the write items: the shard, and its offsets in the whole tensor."""
        return self._items

    def __get_tensor_shard__(self, index: Any) -> Tensor:
        """Return the shard as a plain tensor."""
        return self.as_subclass(Tensor)


def copy_shard_to_host(name: str, tensor: DTensor) -> Tensor:
    """Copy this rank's shard of a DTensor to host memory, in a form that DCP saves as a shard.

    torch 2.10 to 2.13.
    """
    shard = tensor.to_local().detach().to("cpu", copy=True).as_subclass(HostShard)
    shard._items = tensor.__create_write_items__(name, tensor)
    return shard
