"""Read LoRA adapters as PEFT writes them. Nothing in the folder is executed."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tokenyard import ConfigError, LoraAdapter, LoraSettings
from tokenyard.lora import adapters
from tokenyard.sharded import local_shard
from tokenyard_models.families._boxes import slices
from tokenyard_models.hf._folder import (
    STORED_BYTES,
    Reader,
    WeightsError,
    is_hf_folder,
    read_json,
)
from tokenyard_models.hf._peft_config import check_config, is_targeted, value_of
from tokenyard_models.hf._peft_places import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    BASE_DIGEST,
    INNER,
    PREFIX,
    Place,
    places_of,
)

log = logging.getLogger("tokenyard")


class PeftFolder:
    """A folder of LoRA adapters that PEFT wrote. Raises WeightsError for what is not read."""

    def __init__(self, path: Path | str):
        self.path = Path(path)
        self.config = read_json(self.path / ADAPTER_CONFIG)
        check_config(self.config, self.path / ADAPTER_CONFIG)
        if not (self.path / ADAPTER_WEIGHTS).exists():
            raise WeightsError(
                f"{self.path} holds no {ADAPTER_WEIGHTS}; save the adapters by PEFT again"
            )
        self._reader = Reader(self.path / ADAPTER_WEIGHTS)
        # PEFT also saves the weight of a head that has an adapter
        keys: list[str] = list(self._reader.file.keys())
        self._keys = {key for key in keys if not key.endswith(f"{INNER}weight")}
        self._check_tensors()

    @property
    def settings(self) -> LoraSettings:
        """Return the options of the adapters. Raises WeightsError for unusable ones.

        The rank is the highest one of rank_pattern. Adapters of a lower one are filled up by zeros.
        """
        numbers: list[Any] = [self.config.get(key) for key in ("r", "lora_alpha", "lora_dropout")]
        numbers[2] = numbers[2] or 0
        if any(isinstance(n, bool) or not isinstance(n, int | float) for n in numbers):
            raise WeightsError(f"{self.path / ADAPTER_CONFIG} has no usable r and lora_alpha")
        rank, alpha, dropout = numbers
        if rank != int(rank):
            raise WeightsError(f"{self.path / ADAPTER_CONFIG} has r {rank}; it must be whole")
        stabilized = bool(self.config.get("use_rslora"))
        highest = max(rank, *(self.config.get("rank_pattern") or {}).values(), 1)
        if rank > 0:
            alpha *= (highest / rank) ** (0.5 if stabilized else 1)  # the scale of that rank
            rank = highest
        try:
            return LoraSettings(int(rank), float(alpha), float(dropout), stabilized)
        except ConfigError as error:
            raise WeightsError(f"{self.path / ADAPTER_CONFIG}: {error}") from None

    @property
    def base_digest(self) -> str | None:
        """Return what `to_peft` wrote about the numbers of the base. PEFT itself writes nothing."""
        metadata: dict[str, str] = self._reader.file.metadata() or {}
        return metadata.get(BASE_DIGEST)

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

        Raises WeightsError for an adapter that is of none of them, or of another set than
        adapter_config.json names.
        """
        used: set[str] = set()
        names = []
        for name, places in places_of(model).items():
            for place in places:
                self._check_targeted(place)
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
        self.targets(model)  # compares what the folder holds
        places = places_of(model)
        for name, _, adapter in adapters(model):
            for target in adapter.targets:
                weight = f"{name}.{target}".lstrip(".")
                parts = [self._read(place, adapter) for place in places[weight]]
                if not all(m.isfinite().all() for part in parts if part for m in part):
                    log.warning("%s has nan or inf in the adapter of %s", self.path, weight)
                for matrix, value in zip(
                    adapter.matrices(target), self._joined(parts, adapter, target)
                ):
                    shard, first = local_shard(matrix)
                    box = tuple((o, o + n) for o, n in zip(first, shard.shape))
                    shard.copy_(value[slices(box)])

    def _check_tensors(self) -> None:
        """Raise WeightsError for A without B, B without A, and for numbers that are no floats."""
        path = self.path / ADAPTER_WEIGHTS
        for key in sorted(self._keys):
            for one, other in (("lora_A", "lora_B"), ("lora_B", "lora_A")):
                if f".{one}." in key and key.replace(one, other) not in self._keys:
                    raise WeightsError(
                        f"{path} holds {key} without its {other}; save the adapters by PEFT again"
                    )
            dtype = self._reader.file.get_slice(key).get_dtype()
            if dtype not in STORED_BYTES:
                raise WeightsError(
                    f"{key} in {path} is {dtype}; weights are read in {', '.join(STORED_BYTES)}"
                )

    def _check_targeted(self, place: Place) -> None:
        """Raise WeightsError if only one of adapter_config.json and the weights has an adapter."""
        a, _ = self._of(place)
        config = self.path / ADAPTER_CONFIG
        targeted = is_targeted(self.config, place)
        if targeted is True and a not in self._keys:
            key = a or f"an adapter of {place.module}.{place.parameter}"
            raise WeightsError(
                f"{self.path / ADAPTER_WEIGHTS} lacks {key}, which {config} names as a target; "
                "save the adapters by PEFT again"
            )
        if targeted is False and a in self._keys:
            raise WeightsError(
                f"{self.path / ADAPTER_WEIGHTS} holds {a}, and {config} names no such target, so "
                "PEFT leaves it out; save the adapters by PEFT again"
            )

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

    def _read(self, place: Place, adapter: LoraAdapter) -> tuple[Tensor, Tensor] | None:
        """Return A [.., rank, columns] and B [.., rows, rank], with the model's rank and scale."""
        keys = self._of(place)
        if not self._keys.issuperset(keys):
            return None
        a, b = (self._reader.read(key, (slice(None), slice(None))) for key in keys)
        if place.parameter is not None:
            a, b = self._by_expert((a, b), len(adapter.matrices(adapter.targets[0])[0]), place)
        rank, alpha = (
            value_of(self.config.get(f"{name}_pattern"), place, self.config[key])
            for name, key in (("rank", "r"), ("alpha", "lora_alpha"))
        )
        own = LoraSettings(int(rank), alpha, rank_stabilized=adapter.settings.rank_stabilized)
        missing = adapter.settings.rank - own.rank
        if missing and a.shape[-2] == b.shape[-1] == own.rank:
            a = F.pad(a, (0, 0, 0, missing))
            b = F.pad(b, (0, missing))
        if own.scale != adapter.scale:
            b = b * (own.scale / adapter.scale)
        return a, b

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
            for target_part, value in zip((a_part, b_part), part):
                if target_part.shape != value.shape:
                    raise self._wrong_shape(target, value, f"{list(target_part.shape)}")
                target_part.copy_(value)
        return a, b

    def _by_expert(
        self, part: tuple[Tensor, Tensor], experts: int, place: Place
    ) -> tuple[Tensor, Tensor]:
        """Return A [E, rank, columns] and B [E, rows, rank] of PEFT's matrices for all experts."""
        a, b = part
        for matrix, dimension in ((a, 0), (b, 1)):
            if matrix.dim() != 2 or matrix.shape[dimension] % experts:
                raise self._wrong_shape(f"{place.parameter}", matrix, f"of {experts} experts")
        return a.unflatten(0, (experts, -1)), _experts_first(b, experts)

    def _wrong_shape(self, target: str, value: Tensor, wanted: str) -> WeightsError:
        return WeightsError(
            f"{self.path / ADAPTER_WEIGHTS} has an adapter of {target} of the shape "
            f"{list(value.shape)}, and the model's is {wanted}"
        )


def is_peft(path: Path) -> bool:
    """Return whether a folder holds adapters alone, as PEFT saves them."""
    return (path / ADAPTER_CONFIG).is_file() and not is_hf_folder(path)


def _experts_first(b: Tensor, experts: int) -> Tensor:
    """Return B [E, rows, rank] of PEFT's [rows, rank * E]."""
    return b.unflatten(1, (-1, experts)).permute(2, 0, 1)
