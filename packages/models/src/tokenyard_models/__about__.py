"""The version of tokenyard-models."""

__version__ = "0.1.0"
