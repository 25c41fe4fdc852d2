"""The version of tokenyard-bench."""

__version__ = "0.1.0"
