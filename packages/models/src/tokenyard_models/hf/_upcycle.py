"""A dense model's folder becomes one of a model with experts, which computes the same before it is trained.

Sparse upcycling (Komatsuzaki et al. 2022, arXiv 2212.05055): every expert is a copy of the dense layer. Granular
upcycling (He et al. 2024, arXiv 2410.07524): every expert is a slice of it, `granularity` slices make a group, and the
rows of the router are the same within a group, so that tokens take whole groups.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokenyard import ConfigError, RoutingRule
from tokenyard_models.config import MoEConfig, TransformerConfig, check_divides, check_top_k
from tokenyard_models.hf._families import FAMILIES, Family, layout_of
from tokenyard_models.hf._folder import Folder, WeightsError
from tokenyard_models.hf._load import checked_layout, dtype_of, family_of, fill
from tokenyard_models.hf._pieces import Piece
from tokenyard_models.hf._save import config_json, write_config
from tokenyard_models.hf._write import SHARD_BYTES, dtypes, new_folder, write_weights
from tokenyard_models.init import draw_rows
from tokenyard_models.transformer import Transformer

_ROUTER, _UP, _DOWN = "ffn.router.weight", "ffn.experts.up", "ffn.experts.down"


@dataclass(frozen=True)
class Upcycling:
    """What becomes of a dense feed-forward layer: `num_experts` slices of it, each one `granularity`-th of its width.

    With granularity 1 an expert is a copy; with as many as there are experts, they are the layer, split.
    Raises ConfigError for numbers that do not go together.
    """

    num_experts: int  # E
    top_k: int  # K
    granularity: int = 1  # G
    seed: int = 17  # of the router

    def __post_init__(self) -> None:
        for name in ("num_experts", "top_k", "granularity"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1")
        check_top_k("top_k", self.top_k, "num_experts", self.num_experts)
        check_divides("granularity", self.granularity, "num_experts", self.num_experts)

    @property
    def keeps_function(self) -> bool:
        """Say whether a token takes whole groups, whose sum is what the dense layer computes."""
        return self.top_k % self.granularity == 0

    def experts_of(self, ffn_dim: int) -> MoEConfig:
        """Return the MoE layers in place of dense ones [D, ffn_dim]; the chosen weights sum to one."""
        check_divides("granularity", self.granularity, "the width of the dense layers,", ffn_dim)
        width = ffn_dim // self.granularity
        return MoEConfig(width, self.num_experts, self.top_k, rule=RoutingRule(normalize=1))

    def up(self, dense: Tensor) -> Tensor:
        """Return the experts' up [E, 2 F / G, D] from the dense layer's [2 F, D]."""
        slices = dense.unflatten(0, (2, self.granularity, -1)).transpose(0, 1).flatten(1, 2)
        return slices.repeat(self.num_experts // self.granularity, 1, 1)

    def down(self, dense: Tensor) -> Tensor:
        """Return the experts' down [E, D, F / G] from the dense layer's [D, F]: G times, since weights sum to one."""
        slices = dense.unflatten(1, (self.granularity, -1)).transpose(0, 1) * self.granularity
        return slices.repeat(self.num_experts // self.granularity, 1, 1)

    def router(self, name: str, dim: int) -> Tensor:
        """Return a router [E, D]: a row for each group, or for each expert if tokens do not take whole groups."""
        same = self.granularity if self.keeps_function else 1
        rows = torch.empty(self.num_experts // same, dim)
        draw_rows(rows, self.seed, name, 1 / math.sqrt(dim))
        return rows.repeat_interleave(same, 0)


@torch.no_grad()
def upcycle(source: Path | str, target: Path | str, how: Upcycling, *, shard_bytes: int = SHARD_BYTES) -> Transformer:
    """Write a dense model's Hugging Face folder as one with experts: llama and mistral as mixtral, qwen3 as qwen3_moe.

    One layer's experts and a shard, as tensors and as bytes, are in memory at a time. Returns the new model on the meta
    device, without weights. The folder must not exist; it does when all is written. Raises WeightsError for a folder
    that is not whole or not dense, ConfigError for numbers that do not go together.
    """
    target = Path(target)
    if target.exists():
        raise WeightsError(f"{target} exists already; give the name of a new folder")
    folder = Folder(source)
    dense, family = _on_meta(family_of(folder), folder), _with_experts(folder)
    config = _config(dense.config, family, how)
    published = config_json(family, config)
    with torch.device("meta"):
        model: Transformer = family.definition(family.section(published))
    parameters, dtype = dict(model.named_parameters()), dtype_of(folder)
    layout = layout_of(family.model, family.table, config, parameters)
    parameter = partial(_parameter, how, _reading(dense, folder, dtype))
    with new_folder(target) as unfinished:
        write_weights(unfinished, layout, parameter, dtypes(parameters, dtype), shard_bytes)
        write_config(unfinished, published, source, dtype)
    return model


def _with_experts(folder: Folder) -> Family:
    family = family_of(folder)
    if not family.upcycled:
        dense = ", ".join(name for name, other in FAMILIES.items() if other.upcycled)
        raise WeightsError(f"{folder.path} holds a {family.model}, which has experts; upcycled are: {dense}")
    return FAMILIES[family.upcycled]


def _on_meta(family: Family, folder: Folder) -> Any:
    with torch.device("meta"):
        return family.definition(family.section(folder.config))


def _config(dense: TransformerConfig, family: Family, how: Upcycling) -> TransformerConfig:
    usual = family.definition.resolve({}).auxiliary
    return replace(dense, moe=how.experts_of(dense.dense_ffn_dim or 4 * dense.dim), auxiliary=usual)


def _reading(dense: Transformer, folder: Folder, dtype: torch.dtype) -> Callable[[str], Tensor]:
    """Return what reads a parameter of the dense model, by our name."""
    parameters = dict(dense.named_parameters())
    files = {key: name for name, keys in folder.files.items() for key in keys}
    pieces: dict[str, list[Piece]] = {}
    for found in checked_layout(dense, folder, parameters).values():
        for name, piece in found:
            pieces.setdefault(name, []).append(piece)

    def read(name: str) -> Tensor:
        parameter = torch.empty(parameters[name].shape, dtype=dtype)
        for piece in pieces[name]:
            fill(parameter, piece, folder.reader(files[piece.key]))
        return parameter

    return read


def _parameter(how: Upcycling, dense: Callable[[str], Tensor], name: str) -> Tensor:
    """Return a parameter of the model with experts."""
    if name.endswith(_UP):
        return how.up(dense(name.removesuffix(_UP) + "ffn.up"))
    if name.endswith(_DOWN):
        return how.down(dense(name.removesuffix(_DOWN) + "ffn.down"))
    if name.endswith(_ROUTER):
        return how.router(name, dense(name.removesuffix(_ROUTER) + "norm_2.weight").numel())
    return dense(name)
