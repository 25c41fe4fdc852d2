"""Private names of torch that this package uses; a test calls each function.

Each function names the torch versions that have the private name.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed.distributed_c10d import _set_pg_timeout


def set_timeout(group: Any, timeout: timedelta) -> None:
    """Set how long a collective of a process group may take (gloo and NCCL only).

    torch 2.10 to 2.13. `init_device_mesh` always gives its groups the default of half an hour.
    """
    if dist.get_backend(group) in ("gloo", "nccl"):
        _set_pg_timeout(timeout, group)


def init_fake_world(ranks: int) -> None:
    """Initialize the default process group as rank 0 of `ranks` ranks that do not exist.

    torch 2.10 to 2.13. Importing the module registers the backend "fake".
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
