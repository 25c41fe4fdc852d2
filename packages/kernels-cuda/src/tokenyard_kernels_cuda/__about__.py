"""The version of tokenyard-kernels-cuda."""

__version__ = "0.1.0"
