"""tokenyard's backends in Triton: router, permutation and experts. Found through the entry point `tokenyard`.

Nothing here imports triton before a backend is chosen. `TritonExperts` says what the options of the experts mean.
"""

from tokenyard_kernels_triton.__about__ import __version__

__all__ = ["__version__"]
