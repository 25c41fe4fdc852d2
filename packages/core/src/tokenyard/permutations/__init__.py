"""The permutation of core."""

from tokenyard.permutations._torch import TorchPermutation

__all__ = ["TorchPermutation"]
