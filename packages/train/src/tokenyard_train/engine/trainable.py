"""Which parameters are trained: frozen ones, and adapters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase

import torch
from torch import nn

from tokenyard import ConfigError, add_lora
from tokenyard.count import used_numel
from tokenyard.errors import did_you_mean
from tokenyard_train.config.schema import LoraConfig


def freeze(model: nn.Module, patterns: Sequence[str]) -> None:
    """Freeze the parameters whose names match a pattern, such as ``blocks.*.ffn.experts.*``.

    Raises ConfigError for a pattern without a match, or if no parameter is left to train.
    """
    for _, parameter in matching(model, patterns, "frozen"):
        parameter.requires_grad_(False)
    if not any(p.requires_grad for p in model.parameters()):
        raise ConfigError(f"frozen: {', '.join(map(repr, patterns))} leave nothing to train")


def adapt(model: nn.Module, lora: LoraConfig) -> None:
    """Add LoRA adapters to a model; train only these and what `train_also` names.

    Raises ConfigError for a pattern that matches nothing.
    """
    with torch.device("meta"):
        add_lora(model, lora.settings(), lora.targets)
    for _, parameter in matching(model, lora.train_also, "lora.train_also"):
        parameter.requires_grad_(True)


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that the optimizer updates, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def describe_trainable(model: nn.Module) -> str:
    """Return the numbers of trained and of all parameters."""
    numel = used_numel(model)
    total = sum(numel.values())
    trained = sum(numel[p] for p in trainable(model).values())
    share = "" if trained == total else f" ({trained / total:.2%})"
    return f"{trained:,} of {total:,} parameters{share}"


def matching(
    model: nn.Module, patterns: Sequence[str], key: str
) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the parameters whose names match a pattern, for each pattern.

    Raises ConfigError, naming the config's `key`, for a pattern without a match.
    """
    parameters = dict(model.named_parameters())
    for pattern in patterns:
        names = [name for name in parameters if fnmatchcase(name, pattern)]
        if not names:
            hint = did_you_mean(pattern, parameters)
            known = f"{', '.join(list(parameters)[:4])}, ..."
            raise ConfigError(
                f"{key}: {pattern!r} matches no parameter{hint}; their names are {known}"
            )
        yield from ((name, parameters[name]) for name in names)
