"""Callbacks of the training loop.

The base class is ``tokenyard_train.engine.callback.Callback``.
"""

from tokenyard_train.callbacks.installed import build_callbacks
from tokenyard_train.callbacks.register import build_registration
from tokenyard_train.engine.callback import Callback

__all__ = ["Callback", "build_callbacks", "build_registration"]
