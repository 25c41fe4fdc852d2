"""The router of core."""

from tokenyard.routers._topk import TopKRouter

__all__ = ["TopKRouter"]
