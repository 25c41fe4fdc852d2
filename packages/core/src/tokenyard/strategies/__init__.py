"""Core's strategies."""

from tokenyard.strategies._single import SingleStrategy

__all__ = ["SingleStrategy"]
