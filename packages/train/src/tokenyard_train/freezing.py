"""Parameters that are not trained."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn

from tokenyard import ConfigError
from tokenyard.errors import did_you_mean


def freeze(model: nn.Module, patterns: Sequence[str]) -> None:
    """Let no parameter be trained whose name matches one of the patterns, such as ``blocks.*.ffn.experts.*``.

    Raises ConfigError for a pattern that matches none, or if nothing is left to train.
    """
    parameters = dict(model.named_parameters())
    for pattern in patterns:
        found = [name for name in parameters if fnmatchcase(name, pattern)]
        if not found:
            hint = did_you_mean(pattern, parameters)
            known = f"{', '.join(list(parameters)[:4])}, ..."
            raise ConfigError(f"frozen: {pattern!r} matches no parameter{hint}; their names are {known}")
        for name in found:
            parameters[name].requires_grad_(False)
    if not any(p.requires_grad for p in parameters.values()):
        raise ConfigError(f"frozen: {', '.join(map(repr, patterns))} leave nothing to train")
