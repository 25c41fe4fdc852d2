"""Core's permutations."""

from tokenyard.permutations._torch import TorchPermutation

__all__ = ["TorchPermutation"]
