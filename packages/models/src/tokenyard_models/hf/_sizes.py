"""Compare the sizes that config.json claims with the files, before a model of them is built."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

from tokenyard import ConfigError, is_gated
from tokenyard_models.config import TransformerConfig
from tokenyard_models.families._format import HfFormat
from tokenyard_models.families._names import BLOCK, DOWN, ROUTER, UP
from tokenyard_models.hf._folder import CONFIG, Folder, WeightsError
from tokenyard_models.hf._folder_map import rows_of

_LAYERS = ("num_hidden_layers", "n_layers")
_COMPARED = 3  # tensors of a parameter: queries, keys and values, or gate and up


def check_sizes(folder: Folder, hf_format: HfFormat, section: Mapping[str, Any]) -> None:
    """Raise WeightsError if the files hold tensors of other sizes than config.json claims.

    Compares one tensor of each kind, from the first layers. Allocates nothing, however large the
    claim is. `checked_map` compares all tensors once the model is built.
    """
    for key in _LAYERS:
        layers = section.get(key)
        if isinstance(layers, int) and layers > len(folder.keys):
            raise WeightsError(
                f"{folder.path / CONFIG} has {key} {layers}, and the files hold "
                f"{len(folder.keys)} tensors; copy config.json and the files anew"
            )
    try:
        config = hf_format.definition.resolve(section)
    except ConfigError:
        return  # building the model reports it, with the keys that override the section
    files = {key: name for name, keys in folder.files.items() for key in keys}
    rows = {row.parameter: row for row in rows_of(hf_format, folder)}
    for parameter, layer, shape in _shapes(config):
        row = rows[parameter]
        keys = [key.replace("{layer}", str(layer)) for key in row.keys]
        for piece in islice(row.operation(keys, shape, config), _COMPARED):
            if piece.key not in files:
                raise WeightsError(f"{folder.path} lacks {piece.key}")
            name = files[piece.key]
            folder.check(piece.key, piece.shape, folder.reader(name).file, name)


def _shapes(config: TransformerConfig) -> Iterator[tuple[str, int, tuple[int, ...]]]:
    """Yield (parameter, layer, shape) for one parameter of each kind."""
    dim = config.dim
    width = config.heads * config.head_dim
    qkv = width + 2 * config.kv_heads * config.head_dim
    yield "embed.weight", 0, (config.vocab_size, dim)
    yield BLOCK + "attention.qkv.weight", 0, (qkv, dim)
    yield BLOCK + "attention.out.weight", 0, (dim, width)
    dense = set(range(config.layers)) if config.moe is None else config.dense_layers
    if dense:
        factor = 2 if is_gated(config.dense_activation) else 1
        yield BLOCK + "ffn.up", min(dense), (factor * config.dense_width, dim)
        yield BLOCK + "ffn.down", min(dense), (dim, config.dense_width)
    moe = config.moe
    sparse = set(range(config.layers)) - set(dense)
    if moe is not None and sparse:
        factor = 2 if is_gated(moe.activation) else 1
        yield ROUTER, min(sparse), (moe.num_experts, dim)
        yield UP, min(sparse), (moe.num_experts, factor * moe.ffn_dim, dim)
        yield DOWN, min(sparse), (moe.num_experts, dim, moe.ffn_dim)
