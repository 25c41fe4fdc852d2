"""tokenyard over several ranks: strategies and exchanges on torch.distributed.

`connect` joins the processes that torchrun started; strategies call it themselves. `fake_world`
replaces ranks that do not exist, so that a layout over them can be planned.
"""

from tokenyard_parallel.__about__ import __version__
from tokenyard_parallel.processes import connect, fake_world

__all__ = ["__version__", "connect", "fake_world"]
