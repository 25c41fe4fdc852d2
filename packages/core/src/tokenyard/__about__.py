"""The version of tokenyard-core."""

__version__ = "0.1.0"
