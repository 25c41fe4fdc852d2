"""The version of tokenyard-train."""

__version__ = "0.1.0"
