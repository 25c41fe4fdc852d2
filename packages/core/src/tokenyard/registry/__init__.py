"""Find the installed backends, and choose one for each part of a layer."""

from tokenyard.registry._choose import BackendChoice, Request
from tokenyard.registry._discover import Plugin, Problem, installed_plugins
from tokenyard.registry._offers import Offer
from tokenyard.registry._options import check_options
from tokenyard.registry._registry import Registry, default_registry

__all__ = [
    "BackendChoice",
    "Offer",
    "Plugin",
    "Problem",
    "Registry",
    "Request",
    "check_options",
    "default_registry",
    "installed_plugins",
]
