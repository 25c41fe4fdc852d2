"""Launches that begin before the launch before them has ended.

NVIDIA calls it programmatic dependent launch; it needs compute capability 9.0.
"""

from __future__ import annotations

import triton
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def wait_for_launch_before():
    """Wait until the launch before has ended, and let the launch after this one begin.

    The programs of the launch after this one then are on the GPU when this one ends. Each program
    must wait before it reads or writes, and before it ends: so no launch passes the one before it.
    """
    gdc_wait()
    gdc_launch_dependents()
