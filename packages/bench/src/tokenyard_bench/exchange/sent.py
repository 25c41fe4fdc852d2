"""The bytes that a rank sends to other ranks in all-to-alls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tokenyard.measure.timing import Stages


class _SentBytes(TorchDispatchMode):
    """Counts the bytes of the rows that go to other ranks than this one."""

    def __init__(self, rank: int):
        super().__init__()
        self.rank = rank
        self.bytes = 0

    def __torch_dispatch__(
        self, op: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if op is torch.ops._c10d_functional.all_to_all_single.default:
            self._add(args[0], args[2])
        elif op is torch.ops.c10d.alltoall_base_.default:
            self._add(args[1], args[4])
        return op(*args, **(kwargs or {}))

    def _add(self, rows: Tensor, sizes: Sequence[int]) -> None:
        total = sum(sizes)
        if total:
            self.bytes += rows.nbytes // total * (total - sizes[self.rank])


def sent_bytes(stages: Stages, rank: int) -> list[int]:
    """Run a forward and a backward pass; return the bytes that each sends.

    Only torch's all-to-alls with sizes count: an exchange by kernels of its own has zeros.
    """
    sent = []
    result = None
    for stage in stages:
        with _SentBytes(rank) as counter:
            result = stage(result)
        sent.append(counter.bytes)
    return sent
