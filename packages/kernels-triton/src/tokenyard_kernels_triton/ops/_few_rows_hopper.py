"""The matmuls for few rows an expert, with the weight gradients for Hopper GPUs.

Those are limited by writing. From some 8 rows an expert on, they are faster.
"""

from __future__ import annotations

from tokenyard_kernels_triton.ops._few_rows import (
    differentiate_down,
    rows_of,
    times_weight,
    up_and_activate,
)
from tokenyard_kernels_triton.ops._gluon import weight_gradient

__all__ = ["differentiate_down", "rows_of", "times_weight", "up_and_activate", "weight_gradient"]
