"""Writing a folder of weights: shards, one put together at a time, and an index."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from tokenyard.sharded import is_sharded
from tokenyard_models.families._boxes import Piece, slices
from tokenyard_models.hf._families import Layout
from tokenyard_models.hf._folder import INDEX, SINGLE, WeightsError

SHARD_BYTES = 5 * 10**9


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Give a folder to write into, which has the name `path` when all is written, and is gone if that fails.

    Raises WeightsError where it cannot be made.
    """
    unfinished = path.with_name(path.name + ".unfinished")
    if unfinished.exists():
        raise WeightsError(f"{unfinished} is left of a write that was cut off, or yours; remove it")
    try:
        unfinished.mkdir(parents=True)
    except OSError as error:
        raise WeightsError(
            f"{path} cannot be made: {error.strerror}; give the name of a new folder"
        ) from None
    try:
        yield unfinished
        unfinished.rename(path)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def gathered(parameters: Mapping[str, Tensor], name: str) -> Tensor:
    """Return a parameter as a whole, of one that is sharded, too."""
    parameter = parameters[name]
    return parameter.full_tensor() if is_sharded(parameter) else parameter.detach()


def dtypes(parameters: Mapping[str, Tensor], dtype: torch.dtype | None) -> dict[str, torch.dtype]:
    """Return the dtype that each parameter is written in: `dtype`, or its own."""
    return {name: dtype or parameter.dtype for name, parameter in parameters.items()}


def write_weights(
    folder: Path,
    layout: Layout,
    parameter: Callable[[str], Tensor],
    dtypes: Mapping[str, torch.dtype],
    shard_bytes: int,
) -> None:
    """Write tensors in shards of at most so many bytes, each put together from pieces of parameters, and an index.

    `parameter` gives one by our name; it is asked for the next when all pieces of the last are written. `dtypes` are
    those in the file, by our name.
    """
    sizes = {key: _numel(found) * dtypes[found[0][0]].itemsize for key, found in layout.items()}
    shards = list(_shards(sizes, shard_bytes))
    weight_map: dict[str, str] = {}
    last = _Last(parameter)
    total = 0
    for number, keys in enumerate(shards, 1):
        name = SINGLE if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors = {key: _tensor(layout[key], last, dtypes) for key in keys}
        save_file(tensors, folder / name, {"format": "pt"})
        total += sum(t.nbytes for t in tensors.values())
        weight_map |= dict.fromkeys(keys, name)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")


class _Last:
    """Gives parameters by our names; the last one is kept until another is asked for."""

    def __init__(self, parameter: Callable[[str], Tensor]):
        self._parameter, self._name, self._value = parameter, "", torch.empty(0)

    def __call__(self, name: str) -> Tensor:
        if name != self._name:
            self._value = torch.empty(0)  # before the next one is made
            self._name, self._value = name, self._parameter(name)
        return self._value


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


def _tensor(
    found: list[tuple[str, Piece]],
    parameter: Callable[[str], Tensor],
    dtypes: Mapping[str, torch.dtype],
) -> Tensor:
    out = torch.empty(found[0][1].shape, dtype=dtypes[found[0][0]], device="cpu")
    for name, piece in found:
        place = out[slices(piece.theirs)]
        place.copy_(piece.turned(parameter(name)[slices(piece.ours)]).reshape(place.shape))
    return out


def _numel(found: list[tuple[str, Piece]]) -> int:
    return torch.Size(found[0][1].shape).numel()
