"""The version of tokenyard-kernels-triton."""

__version__ = "0.1.0"
