"""Low-rank adapters (LoRA) of a model: of linear layers, experts and dense feed-forward networks.

``tokenyard.adapter`` has the equation. Experts with adapters are computed by their kernel if it can
(``tokenyard.interfaces.LoraExpertKernel``), else by core's grouped matmuls.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tokenyard.adapter import LoraAdapter, LoraSettings
from tokenyard.errors import ConfigError, did_you_mean
from tokenyard.fused_rows import fused_rows
from tokenyard.sharded import is_sharded

ALL_LINEAR = "all-linear"
"""Target that stands for all weights that may have an adapter, without the head."""


class LoraWeight(NamedTuple):
    """A weight that may have an adapter."""

    owner: Any  # the module
    attribute: str  # its name in the module
    parts: tuple[int, ...] = ()  # rows of each part, if the parts have an A each

    @property
    def tensor(self) -> Tensor:
        """Return the weight."""
        tensor: Tensor = getattr(self.owner, self.attribute)
        return tensor


def lora_weights(model: nn.Module) -> dict[str, LoraWeight]:
    """Return by name the weights that may have an adapter.

    They are those of linear layers, of experts and of dense feed-forward networks. The router has
    none. The matrices of a dense weight that `fused_rows` names are its parts. Gate and up
    projection of experts share an A, as in PEFT.
    """
    fused = fused_rows(model)
    found: dict[str, LoraWeight] = {}
    for prefix, module in model.named_modules():
        names = ("weight",) if isinstance(module, nn.Linear) else ()
        for attribute in getattr(module, "lora_weights", names):
            name = f"{prefix}.{attribute}".lstrip(".")
            rows = fused.get(name, ())
            parts = rows if len(rows) > 1 and getattr(module, attribute).dim() == 2 else ()
            found[name] = LoraWeight(module, attribute, parts)
    return found


def add_lora(
    model: nn.Module, settings: LoraSettings, targets: Sequence[str] | str = ALL_LINEAR
) -> None:
    """Add adapters to the weights that `targets` name, and freeze all other parameters.

    A target is a pattern of `lora_weights`, such as ``blocks.*.attention.qkv.weight``, or of the
    end of a name, such as ``attention.*`` or ``experts.up``. ``all-linear`` stands for all of them
    but the head. Raises ConfigError for a target without a match, and for a model that has adapters
    already.
    """
    if any(isinstance(module, LoraAdapter) for module in model.modules()):
        raise ConfigError(
            "the model has adapters already; merge_lora makes them part of the weights"
        )
    chosen = _chosen(model, targets)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    owners = {id(weight.owner): weight.owner for weight in chosen}
    for key, owner in owners.items():
        _require_one_width(owner)
        own = [weight for weight in chosen if id(weight.owner) == key]
        weights = {weight.attribute: weight.tensor for weight in own}
        parts = {weight.attribute: weight.parts for weight in own if weight.parts}
        owner.adapter = LoraAdapter(weights, parts, settings)
        if isinstance(owner, nn.Linear):
            owner.adapter.hook = owner.register_forward_hook(_add_adapter)


def _require_one_width(owner: Any) -> None:
    """Raise ConfigError for experts of several widths, which grouped matmuls do not compute."""
    workload = getattr(owner, "workload", None)
    if workload is not None and workload.ffn_dims is not None:
        raise ConfigError(
            f"adapters are for experts of one width, and ffn_dims is {list(workload.ffn_dims)}; "
            "leave the experts out of the targets"
        )


def adapters(model: nn.Module) -> Iterator[tuple[str, Any, LoraAdapter]]:
    """Yield the name, the owner and the adapter of each module that has one."""
    for name, module in model.named_modules():
        adapter = getattr(module, "adapter", None)
        if isinstance(adapter, LoraAdapter):
            yield name, module, adapter


@torch.no_grad()
def merge_lora(model: nn.Module) -> None:
    """Add each adapter's change to its weights, and remove the adapters.

    Raises ConfigError if the model is sharded.
    """
    for _, owner, adapter in list(adapters(model)):
        for target in adapter.targets:
            weight: Tensor = getattr(owner, target)
            if is_sharded(weight):
                raise ConfigError(
                    "a sharded model's adapters cannot be merged; load it in one process first"
                )
            wide = torch.promote_types(weight.dtype, torch.float32)
            weight.copy_(weight.to(wide) + adapter.delta(target, wide))
        if adapter.hook is not None:
            adapter.hook.remove()
        owner.adapter = None


def head_inputs(x: Tensor, head: nn.Linear) -> tuple[Tensor, Tensor]:
    """Return the x and the weight of a head whose matmul `predict` computes, adapter included."""
    adapter = getattr(head, "adapter", None)
    if not isinstance(adapter, LoraAdapter):
        return x, head.weight
    return adapter.widened(x, head.weight, "weight")


def _add_adapter(linear: Any, inputs: tuple[Tensor, ...], y: Tensor) -> Tensor:
    added: Tensor = linear.adapter(y, inputs[0], "weight")
    return added


def _chosen(model: nn.Module, targets: Sequence[str] | str) -> list[LoraWeight]:
    weights = lora_weights(model)
    if targets == ALL_LINEAR:
        vocabulary = getattr(model, "vocab_size", None)
        return [weight for weight in weights.values() if not _is_head(weight, vocabulary)]
    chosen: dict[str, LoraWeight] = {}
    for target in [targets] if isinstance(targets, str) else targets:
        names = [name for name in weights if _matches(name, target)]
        if not names:
            patterns = dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name) for name in weights)
            raise ConfigError(
                f"lora target {target!r} matches no weight{did_you_mean(target, patterns)}; those "
                f"that may have an adapter are: {', '.join(patterns) or 'none'}"
            )
        chosen |= {name: weights[name] for name in names}
    return list(chosen.values())


def _matches(name: str, target: str) -> bool:
    return fnmatchcase(name, target) or fnmatchcase(name, f"*.{target}")


def _is_head(weight: LoraWeight, vocabulary: int | None) -> bool:
    return isinstance(weight.owner, nn.Linear) and weight.tensor.shape[0] == vocabulary
