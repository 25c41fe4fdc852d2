"""Training Mixture-of-Experts language models from one YAML file."""

from tokenyard_train.__about__ import __version__

__all__ = ["__version__"]
