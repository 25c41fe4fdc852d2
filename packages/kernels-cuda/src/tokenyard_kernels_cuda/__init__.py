"""tokenyard's permutation and router in CUDA C++. Found through the entry point `tokenyard`.

The sources lie in ``kernels/``; ``toolchain/`` compiles them by NVRTC when they are first used, keeps what comes out on
disk, and launches. Nothing here imports cuda.bindings before a kernel is launched.
"""

from tokenyard_kernels_cuda.__about__ import __version__

__all__ = ["__version__"]
