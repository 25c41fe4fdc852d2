"""Writing a model as a Hugging Face folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tokenyard_models.config import TransformerConfig
from tokenyard_models.hf._families import FAMILIES, Family, Layout, layout_of
from tokenyard_models.hf._folder import CONFIG, INDEX, SINGLE, WeightsError, read_json
from tokenyard_models.hf._pieces import Piece, slices
from tokenyard_models.init import unwrapped
from tokenyard_models.transformer import Transformer

SHARD_BYTES = 5 * 10**9
_OF_TRAINING = ("auxiliary", "expert_parallel", "moe.forced_balance", "dense_ffn_dim", "moe.rule.jitter")
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
_BESIDE = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "tiktoken.model",
    "chat_template.jinja",
)
"""What belongs to a model's text, and goes from folder to folder as it is."""


@torch.no_grad()
def to_hf(
    model: nn.Module,
    path: Path | str,
    *,
    like: Path | str | None = None,
    dtype: torch.dtype | None = None,
    fused: bool = False,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a model as a folder that transformers loads: shards of at most `shard_bytes`, index, config.json.

    `like` is a folder whose tokenizer, generation settings and token ids go along; `dtype` is that of the weights, left
    out the parameters' own; `fused` writes one tensor for all experts of a layer where the family has such a form.
    A shard is put together at a time. The folder must not exist; it does when all is written. Raises WeightsError for a
    model of no such family.
    """
    path = Path(path)
    if path.exists():
        raise WeightsError(f"{path} exists already; give the name of a new folder")
    family = _family(model, fused)
    parameters = {unwrapped(name): p for name, p in model.named_parameters()}
    config: Any = model.config
    layout = layout_of(family.model, family.entries(fused), config, parameters)
    published = family.publish(config)
    _check_published(family, config, published)
    with new_folder(path) as folder:
        write_weights(folder, layout, parameters, dtype, shard_bytes)
        _write_config(folder, published, like, dtype or next(iter(parameters.values())).dtype)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Give a folder to write into, which has the name `path` when all is written, and is gone if that fails."""
    unfinished = path.with_name(path.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        unfinished.rename(path)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def _family(model: nn.Module, fused: bool) -> Family:
    definition = getattr(model, "definition", None)
    found = [family for family in FAMILIES.values() if family.model == definition]
    if not isinstance(model, Transformer) or not found:
        known = ", ".join(family.model for family in FAMILIES.values())
        raise WeightsError(f"a {definition or type(model).__name__} has no Hugging Face form here; these have: {known}")
    if fused and not found[0].fused:
        raise WeightsError(f"{definition} has no fused form: its folder holds one tensor for all experts anyway")
    return found[0]


def _check_published(family: Family, config: TransformerConfig, published: Mapping[str, Any]) -> None:
    """Raise WeightsError for what a config.json of the family cannot say of the model: whoever reads it would err."""
    told, meant = (_computed(asdict(c)) for c in (family.definition.resolve(family.section(published)), config))
    for name, value in meant.items():
        if told.get(name) != value:
            raise WeightsError(f"a {family.model} folder cannot say that {name} is {value!r}, only {told.get(name)!r}")


def _computed(config: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    """Return, by name, what decides what a model computes; not how it is trained."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        name = where + key
        if not name.startswith(_OF_TRAINING):
            found |= _computed(value, f"{name}.") if isinstance(value, Mapping) else {name: value}
    return found


def write_weights(
    folder: Path, layout: Layout, parameters: Mapping[str, Tensor], dtype: torch.dtype | None, shard_bytes: int
) -> None:
    """Write tensors in shards of at most so many bytes, each put together from pieces of parameters, and an index."""
    width = {name: (dtype or p.dtype).itemsize for name, p in parameters.items()}
    shards = list(_shards({key: _numel(found) * width[found[0][0]] for key, found in layout.items()}, shard_bytes))
    weight_map: dict[str, str] = {}
    whole = _Whole(parameters)
    total = 0
    for number, keys in enumerate(shards, 1):
        name = SINGLE if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors = {key: _tensor(layout[key], whole, dtype) for key in keys}
        save_file(tensors, folder / name, {"format": "pt"})
        total += sum(t.nbytes for t in tensors.values())
        weight_map |= dict.fromkeys(keys, name)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")


def _shards(sizes: Mapping[str, int], most: int) -> Iterator[list[str]]:
    """Share tensors out, in order, over files of at most so many bytes (or of one tensor that has more)."""
    keys: list[str] = []
    filled = 0
    for key, size in sizes.items():
        if keys and filled + size > most:
            yield keys
            keys, filled = [], 0
        keys.append(key)
        filled += size
    yield keys


class _Whole:
    """Gives parameters as wholes, and keeps the last one, since its pieces come one after another."""

    def __init__(self, parameters: Mapping[str, Tensor]):
        self.parameters, self.name, self.tensor = parameters, "", torch.empty(0)

    def __getitem__(self, name: str) -> Tensor:
        if name != self.name:
            parameter = self.parameters[name]
            self.tensor = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter.detach()
            self.name = name
        return self.tensor


def _tensor(found: list[tuple[str, Piece]], whole: _Whole, dtype: torch.dtype | None) -> Tensor:
    first = whole[found[0][0]]
    out = torch.empty(found[0][1].shape, dtype=dtype or first.dtype, device="cpu")
    for name, piece in found:
        place = out[slices(piece.theirs)]
        place.copy_(piece.turned(whole[name][slices(piece.ours)]).reshape(place.shape))
    return out


def _numel(found: list[tuple[str, Piece]]) -> int:
    return torch.Size(found[0][1].shape).numel()


def _write_config(folder: Path, config: dict[str, Any], like: Path | str | None, dtype: torch.dtype) -> None:
    if like is not None:
        theirs = read_json(Path(like) / CONFIG) if (Path(like) / CONFIG).exists() else {}
        config = {key: theirs[key] for key in _TOKENS if key in theirs} | config
        for name in _BESIDE:
            if (Path(like) / name).is_file():
                shutil.copy(Path(like) / name, folder / name)
    config |= {"dtype": str(dtype).removeprefix("torch."), "torch_dtype": str(dtype).removeprefix("torch.")}
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    if not (folder / "generation_config.json").exists():
        ids = {key: config[key] for key in _TOKENS if config.get(key) is not None}
        (folder / "generation_config.json").write_text(json.dumps(ids, indent=2) + "\n", encoding="utf-8")
