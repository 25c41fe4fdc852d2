"""The strategy of core."""

from tokenyard.strategies._single import SingleStrategy

__all__ = ["SingleStrategy"]
