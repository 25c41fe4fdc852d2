"""Laying a model out over the processes of a run."""

from tokenyard_parallel.strategies._fsdp import DdpStrategy, FsdpStrategy

__all__ = ["DdpStrategy", "FsdpStrategy"]
