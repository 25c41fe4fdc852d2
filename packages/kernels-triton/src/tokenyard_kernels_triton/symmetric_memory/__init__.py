"""The exchange `symmetric_memory`: ranks of one node read tokens from each other's memory."""

from tokenyard_kernels_triton.symmetric_memory._exchange import SymmetricMemoryExchange

__all__ = ["SymmetricMemoryExchange"]
