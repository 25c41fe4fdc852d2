"""The version of tokenyard-parallel."""

__version__ = "0.1.0"
