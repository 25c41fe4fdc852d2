"""Strategies: they lay a model out over the ranks of a run."""

from tokenyard_parallel.strategies._ddp import DdpStrategy
from tokenyard_parallel.strategies._fsdp import FsdpStrategy

__all__ = ["DdpStrategy", "FsdpStrategy"]
