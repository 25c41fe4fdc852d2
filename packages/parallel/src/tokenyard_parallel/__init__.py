"""tokenyard over several processes: strategies and exchanges on torch.distributed. Found through the entry point.

`connect` joins the processes that torchrun started; strategies do it by themselves.
"""

from tokenyard_parallel.__about__ import __version__
from tokenyard_parallel.processes import connect, started_processes

__all__ = ["__version__", "connect", "started_processes"]
