"""What ranks must agree on before one reads the memory of another."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tokenyard.errors import BackendError
from tokenyard.peer_memory import node_number

_KINDS = ("tokens of width", "experts a token:", "bytes a number:", "bytes a weight:")


def most_tokens(group: Any, x: Tensor, topk_weights: Tensor) -> int:
    """Return the largest number of tokens of any rank; a collective with a host sync.

    Raises BackendError on every rank if ranks are on several nodes or send different kinds of rows.
    """
    kind = [x.shape[1], topk_weights.shape[1], x.element_size(), topk_weights.element_size()]
    own = torch.tensor([x.shape[0], node_number(), *kind], device=x.device)
    gathered = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(gathered, own, group=group)
    tokens, nodes, *kinds = torch.stack(gathered, 1).tolist()
    if len(set(nodes)) > 1:
        raise BackendError(
            "the exchange symmetric_memory needs all ranks that share experts on one node, and "
            "they are on several; use all_to_all_tokens, or a smaller expert_parallel"
        )
    for name, values in zip(_KINDS, kinds):
        for rank, value in enumerate(values):
            if value != values[0]:
                raise BackendError(
                    f"rank {rank} of the exchange's group has {name} {value}, "
                    f"and rank 0 {values[0]}; all must have the same"
                )
    return int(max(tokens))
