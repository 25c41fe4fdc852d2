"""Translate a config of LLM Foundry to the keys of this package.

Each function takes the config as a mapping of resolved values and returns a new one. It appends a
`Change` for each key that it read in another way than it is written. A config without keys of LLM
Foundry comes back as it is.
"""

from tokenyard_train.config.translate.change import Change
from tokenyard_train.config.translate.whole import translate

__all__ = ["Change", "translate"]
