"""Write and read LoRA adapters as PEFT does: adapter_config.json and adapter_model.safetensors.

Linear layers are `target_modules`. The experts of a layer, which transformers 5 holds as one tensor
of three dimensions, are `target_parameters`: A is [E * rank, columns] and B is [rows, rank * E].
Nothing in the folder is executed. PEFT is not needed; a test compares with it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tokenyard import ConfigError, LoraAdapter, LoraSettings
from tokenyard.lora import adapters, lora_weights
from tokenyard.sharded import is_sharded, local_shard
from tokenyard_models.families._boxes import copy, slices
from tokenyard_models.hf._folder import Reader, WeightsError, is_hf_folder, read_json
from tokenyard_models.hf._save import format_to_write
from tokenyard_models.hf._shards import new_folder

ADAPTER_CONFIG = "adapter_config.json"
_WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_INNER = "base_layer."  # PEFT wraps the first of two parameters of a module inside the second
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


class _Place(NamedTuple):
    """Where PEFT has the adapter of a weight, or of one part of a fused weight."""

    module: str  # with LoRA's matrices, such as model.layers.0.self_attn.q_proj
    parameter: str | None  # of a module's target_parameters, such as gate_up_proj


@torch.no_grad()
def to_peft(
    model: nn.Module, path: Path | str, *, base: str | None = None, dtype: torch.dtype | None = None
) -> int:
    """Write a model's adapters as a new folder that PEFT loads; return their number of parameters.

    `base` is the folder or the name of the model that they are for. `dtype` is that of the matrices
    (default: their own). Raises WeightsError for a model without adapters, for one that PEFT has no
    form of, and for one whose other parameters were trained too.
    """
    found = [(name, adapter) for name, _, adapter in adapters(model)]
    if not found:
        raise WeightsError("the model has no LoRA adapters; write it by --to hf")
    trained = [n for n, p in model.named_parameters() if p.requires_grad and ".adapter." not in n]
    if trained:
        raise WeightsError(
            f"PEFT's folder holds adapters alone, and {trained[0]} was trained too; write the "
            "merged model by --to hf"
        )
    places = _places(model)
    tensors: dict[str, Tensor] = {}
    for name, adapter in found:
        for target in adapter.targets:
            inner = _INNER if _is_inner(target, adapter.targets) else ""
            for place, a, b in _matrices(places, name, target, adapter):
                for letter, matrix in (("A", a), ("B", b)):
                    key = f"{_PREFIX}{place.module}.{inner if place.parameter else ''}lora_{letter}"
                    tensors[f"{key}.weight"] = matrix.to("cpu", dtype or matrix.dtype).contiguous()
    config = _config(places, found, base)
    with new_folder(Path(path)) as folder:
        save_file(tensors, folder / _WEIGHTS, {"format": "pt"})
        text = json.dumps(config, indent=2) + "\n"
        (folder / ADAPTER_CONFIG).write_text(text, encoding="utf-8")
    return sum(tensor.numel() for tensor in tensors.values())


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
        if not (self.path / _WEIGHTS).exists():
            raise WeightsError(f"{self.path} holds no {_WEIGHTS}; save the adapters by PEFT again")
        self._reader = Reader(self.path / _WEIGHTS)
        # PEFT also saves the weight of a head that has an adapter
        keys: list[str] = list(self._reader.file.keys())
        self._keys = {key for key in keys if not key.endswith(f"{_INNER}weight")}

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
        for name, places in _places(model).items():
            keys = {key for place in places for key in self._of(place) if key in self._keys}
            if keys:
                names.append(name)
            used |= keys
        if unused := sorted(self._keys - used):
            raise WeightsError(
                f"{self.path / _WEIGHTS} holds {unused[0]}, which the model has no adapter for"
            )
        return names

    @torch.no_grad()
    def fill(self, model: nn.Module) -> None:
        """Fill a model's adapters, of any layout. A part that has none here becomes zero.

        Raises WeightsError for a matrix of another shape.
        """
        places = _places(model)
        for name, _, adapter in adapters(model):
            for target in adapter.targets:
                parts = [self._read(place) for place in places[f"{name}.{target}".lstrip(".")]]
                for matrix, value in zip(
                    adapter.matrices(target), self._joined(parts, adapter, target)
                ):
                    shard, first = local_shard(matrix)
                    box = tuple((o, o + n) for o, n in zip(first, shard.shape))
                    shard.copy_(value[slices(box)])

    def _of(self, place: _Place) -> tuple[str, str]:
        """Return the names of A and B."""
        inner = ""
        if place.parameter is not None:
            targets = self.config.get("target_parameters") or []
            leaves = [str(target).rpartition(".")[2] for target in targets]
            if place.parameter not in leaves:
                return "", ""
            inner = _INNER if place.parameter == "gate_up_proj" and "down_proj" in leaves else ""
        key = f"{_PREFIX}{place.module}.{inner}lora_"
        return f"{key}A.weight", f"{key}B.weight"

    def _read(self, place: _Place) -> tuple[Tensor, Tensor] | None:
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
                        f"{self.path / _WEIGHTS} has an adapter of {target} of the shape "
                        f"{list(value.shape)}, and the model's is {list(target_part.shape)}"
                    )
                target_part.copy_(value)
        return a, b


def is_peft(path: Path) -> bool:
    """Return whether a folder holds adapters alone, as PEFT saves them."""
    return (path / ADAPTER_CONFIG).is_file() and not is_hf_folder(path)


def _places(model: Any) -> dict[str, list[_Place]]:
    """Return where PEFT has the adapter of each weight; of a fused one, of each part.

    A weight that PEFT has no form of is left out.
    """
    hf_format = format_to_write(model)
    places: dict[str, list[_Place]] = {}
    weights = lora_weights(model)
    for row in hf_format.rows(fused=True):
        for layer in range(model.config.layers) if "{layer}" in row.parameter else [0]:
            name = row.parameter.replace("{layer}", str(layer))
            if name not in weights:
                continue
            keys = [key.replace("{layer}", str(layer)) for key in row.keys]
            weight = weights[name]
            stacked = weight.tensor.dim() == 3 and row.operation is not copy
            if len(weight.parts or (0,)) == len(keys) and not stacked:
                places[name] = [_place(key) for key in keys]
    return places


def _place(key: str) -> _Place:
    module, _, leaf = key.rpartition(".")
    return _Place(module, None if leaf == "weight" else leaf)


def _matrices(
    places: Mapping[str, list[_Place]], name: str, target: str, adapter: LoraAdapter
) -> Iterator[tuple[_Place, Tensor, Tensor]]:
    """Yield the place, A and B of each part of a weight, in PEFT's shapes."""
    weight = f"{name}.{target}".lstrip(".")
    if weight not in places:
        raise WeightsError(
            f"PEFT has no adapter of {weight} in this architecture; write the merged model by "
            "--to hf"
        )
    a, b = (_whole(matrix) for matrix in adapter.matrices(target))
    rows = adapter.parts.get(target, (b.shape[-2],))
    for place, a_part, b_part in zip(
        places[weight], a.split(adapter.settings.rank, -2), b.split(rows, -2)
    ):
        if a.dim() == 2:
            yield place, a_part, b_part
        else:
            yield place, a_part.flatten(0, 1), b_part.permute(1, 2, 0).flatten(1)


def _experts_first(b: Tensor, experts: int) -> Tensor:
    """Return B [E, rows, rank] of PEFT's [rows, rank * E]."""
    return b.unflatten(1, (-1, experts)).permute(2, 0, 1)


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if is_sharded(tensor) else tensor.detach()


def _is_inner(target: str, targets: list[str]) -> bool:
    return target == "up" and "down" in targets


def _config(
    places: Mapping[str, list[_Place]], found: list[tuple[str, LoraAdapter]], base: str | None
) -> dict[str, Any]:
    """Return adapter_config.json."""
    settings = found[0][1].settings
    chosen = {f"{name}.{t}".lstrip(".") for name, adapter in found for t in adapter.targets}
    modules, parameters = (_targets(places, chosen, kind) for kind in (False, True))
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": settings.rank,
        "lora_alpha": settings.alpha,
        # PEFT has none for parameters
        "lora_dropout": 0.0 if parameters else settings.dropout,
        "use_rslora": settings.rank_stabilized,
        "target_modules": modules,
        "target_parameters": parameters or None,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
    }


def _targets(places: Mapping[str, list[_Place]], chosen: set[str], parameters: bool) -> list[str]:
    """Return PEFT's names of the chosen weights: without the layer where all layers have them."""
    layers: dict[str, set[str]] = {}  # name without the layer -> names with it
    missing: set[str] = set()
    for name, parts in places.items():
        for place in parts:
            if (place.parameter is not None) != parameters:
                continue
            full = ".".join(filter(None, place))
            short = re.sub(r"^model\.layers\.\d+\.", "", full)
            layers.setdefault(short, set())
            if name in chosen:
                layers[short].add(full)
            else:
                missing.add(short)
    names: list[str] = []
    for short, full_names in layers.items():
        names += sorted(full_names) if short in missing else [short]
    return names
