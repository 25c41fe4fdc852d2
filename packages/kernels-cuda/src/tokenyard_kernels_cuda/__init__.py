"""Permutation and router of tokenyard in CUDA C++, registered by the entry point `tokenyard`.

``kernels/`` holds the sources. ``toolchain/`` compiles them with NVRTC on first use, caches the
cubins on disk and launches the kernels. Importing this package does not import cuda.bindings.
"""

from tokenyard_kernels_cuda.__about__ import __version__

__all__ = ["__version__"]
