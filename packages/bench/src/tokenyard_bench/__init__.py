"""Measure MoE layers and their pieces, beside dense matmuls and other libraries."""

from tokenyard_bench.__about__ import __version__

__all__ = ["__version__"]
