"""Core's routers."""

from tokenyard.routers._topk import TopKRouter

__all__ = ["TopKRouter"]
