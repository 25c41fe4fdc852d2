"""Read LoRA adapters as PEFT writes them. Nothing in the folder is executed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tokenyard import ConfigError, LoraAdapter, LoraSettings
from tokenyard.lora import adapters
from tokenyard.sharded import local_shard
from tokenyard_models.families._boxes import slices
from tokenyard_models.hf._folder import Reader, WeightsError, is_hf_folder, read_json
from tokenyard_models.hf._peft_places import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    INNER,
    PREFIX,
    Place,
    places_of,
)

_READ: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": (None, "none"),
    "use_dora": (None, False),
    "fan_in_fan_out": (None, False),
    "modules_to_save": (None, []),
    "rank_pattern": (None, {}),
    "alpha_pattern": (None, {}),
    "layer_replication": (None,),
}
"""Keys of adapter_config.json -> the values that are read."""


class PeftFolder:
    """A folder of LoRA adapters that PEFT wrote. Raises WeightsError for what is not read."""

    def __init__(self, path: Path | str):
        self.path = Path(path)
        self.config = read_json(self.path / ADAPTER_CONFIG)
        for key, values in _READ.items():
            if self.config.get(key) not in values:
                raise WeightsError(
                    f"{self.path / ADAPTER_CONFIG} has {key} {self.config.get(key)!r}; read is "
                    f"{values[0]!r} only: merge the adapters by PEFT's merge_and_unload"
                )
        if not (self.path / ADAPTER_WEIGHTS).exists():
            raise WeightsError(
                f"{self.path} holds no {ADAPTER_WEIGHTS}; save the adapters by PEFT again"
            )
        self._reader = Reader(self.path / ADAPTER_WEIGHTS)
        # PEFT also saves the weight of a head that has an adapter
        keys: list[str] = list(self._reader.file.keys())
        self._keys = {key for key in keys if not key.endswith(f"{INNER}weight")}

    @property
    def settings(self) -> LoraSettings:
        """Return the options of the adapters. Raises WeightsError for unusable ones."""
        numbers: list[Any] = [self.config.get(key) for key in ("r", "lora_alpha", "lora_dropout")]
        numbers[2] = numbers[2] or 0
        if any(isinstance(n, bool) or not isinstance(n, int | float) for n in numbers):
            raise WeightsError(f"{self.path / ADAPTER_CONFIG} has no usable r and lora_alpha")
        rank, alpha, dropout = numbers
        stabilized = bool(self.config.get("use_rslora"))
        try:
            return LoraSettings(int(rank), float(alpha), float(dropout), stabilized)
        except ConfigError as error:
            raise WeightsError(f"{self.path / ADAPTER_CONFIG}: {error}") from None

    @property
    def base(self) -> Path:
        """Return the folder of the base. Raises WeightsError if it is not on this machine."""
        name = self.config.get("base_model_name_or_path")
        if not isinstance(name, str) or not is_hf_folder(Path(name)):
            raise WeightsError(
                f"{self.path / ADAPTER_CONFIG} names the base {name!r}, which is no folder here; "
                "put the folder's path in base_model_name_or_path"
            )
        return Path(name)

    def targets(self, model: nn.Module) -> list[str]:
        """Return the names of the model's weights that have adapters here.

        Raises WeightsError for an adapter that is of none of them.
        """
        used: set[str] = set()
        names = []
        for name, places in places_of(model).items():
            keys = {key for place in places for key in self._of(place) if key in self._keys}
            if keys:
                names.append(name)
            used |= keys
        if unused := sorted(self._keys - used):
            raise WeightsError(
                f"{self.path / ADAPTER_WEIGHTS} holds {unused[0]}, "
                "which the model has no adapter for"
            )
        return names

    @torch.no_grad()
    def fill(self, model: nn.Module) -> None:
        """Fill a model's adapters, of any layout. A part that has none here becomes zero.

        Raises WeightsError for a matrix of another shape.
        """
        places = places_of(model)
        for name, _, adapter in adapters(model):
            for target in adapter.targets:
                parts = [self._read(place) for place in places[f"{name}.{target}".lstrip(".")]]
                for matrix, value in zip(
                    adapter.matrices(target), self._joined(parts, adapter, target)
                ):
                    shard, first = local_shard(matrix)
                    box = tuple((o, o + n) for o, n in zip(first, shard.shape))
                    shard.copy_(value[slices(box)])

    def _of(self, place: Place) -> tuple[str, str]:
        """Return the names of A and B."""
        inner = ""
        if place.parameter is not None:
            targets = self.config.get("target_parameters") or []
            leaves = [str(target).rpartition(".")[2] for target in targets]
            if place.parameter not in leaves:
                return "", ""
            inner = INNER if place.parameter == "gate_up_proj" and "down_proj" in leaves else ""
        key = f"{PREFIX}{place.module}.{inner}lora_"
        return f"{key}A.weight", f"{key}B.weight"

    def _read(self, place: Place) -> tuple[Tensor, Tensor] | None:
        a, b = self._of(place)
        if a not in self._keys or b not in self._keys:
            return None
        whole = (slice(None), slice(None))
        return self._reader.read(a, whole), self._reader.read(b, whole)

    def _joined(
        self, parts: list[tuple[Tensor, Tensor] | None], adapter: LoraAdapter, target: str
    ) -> tuple[Tensor, Tensor]:
        """Return A and B of a weight from those of its parts."""
        a, b = (torch.zeros(m.shape, dtype=m.dtype) for m in adapter.matrices(target))
        rank = adapter.settings.rank
        rows = adapter.parts.get(target, (b.shape[-2],))
        for part, a_part, b_part in zip(parts, a.split(rank, -2), b.split(rows, -2)):
            if part is None:
                continue
            if a.dim() == 3:
                part = (part[0].unflatten(0, (len(a), -1)), _experts_first(part[1], len(a)))
            for target_part, value in zip((a_part, b_part), part):
                if target_part.shape != value.shape:
                    raise WeightsError(
                        f"{self.path / ADAPTER_WEIGHTS} has an adapter of {target} of the shape "
                        f"{list(value.shape)}, and the model's is {list(target_part.shape)}"
                    )
                target_part.copy_(value)
        return a, b


def is_peft(path: Path) -> bool:
    """Return whether a folder holds adapters alone, as PEFT saves them."""
    return (path / ADAPTER_CONFIG).is_file() and not is_hf_folder(path)


def _experts_first(b: Tensor, experts: int) -> Tensor:
    """Return B [E, rows, rank] of PEFT's [rows, rank * E]."""
    return b.unflatten(1, (-1, experts)).permute(2, 0, 1)
