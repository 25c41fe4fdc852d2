"""Finding the installed backends and choosing among them, once, at construction."""

from tokenyard.registry._choose import Chosen
from tokenyard.registry._discover import Problem, installed_plugins
from tokenyard.registry._registry import Offer, Registry, default_registry

__all__ = ["Chosen", "Offer", "Problem", "Registry", "default_registry", "installed_plugins"]
