"""tokenyard over several processes: strategies and exchanges on torch.distributed. Found through the entry point.

`connect` joins the processes that torchrun started; strategies do it by themselves. `imagine` stands in for processes
that do not exist, to see how a model would lie over them.
"""

from tokenyard_parallel.__about__ import __version__
from tokenyard_parallel.processes import connect, imagine

__all__ = ["__version__", "connect", "imagine"]
