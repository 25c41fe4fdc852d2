"""tokenyard's backends in Triton: router, permutation and experts.

The registry finds them by the entry point `tokenyard`. Triton is imported when a backend is chosen.
`TritonExperts` documents the options of the experts.
"""

from tokenyard_kernels_triton.__about__ import __version__

__all__ = ["__version__"]
