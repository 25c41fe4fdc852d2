"""Write a folder of weights: shards, built one at a time, and an index."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from tokenyard.draw import unwrapped
from tokenyard.sharded import is_sharded
from tokenyard_models.families._boxes import Piece, slices
from tokenyard_models.hf._folder import INDEX, SINGLE, WeightsError
from tokenyard_models.hf._folder_map import FolderMap
from tokenyard_models.hf._values import check_cast

log = logging.getLogger("tokenyard")

SHARD_BYTES = 5 * 10**9

Report = Callable[[int, int], None]
"""Receives the bytes that are written, and those of all tensors: first 0, then after each shard."""


def silent(written: int, total: int) -> None:
    """Report nothing."""


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder, renamed to `path` on success and removed on failure.

    Raises WeightsError if it cannot be created or written, for example on a full disk.
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
    except (OSError, SafetensorError) as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        reason = (error.strerror if isinstance(error, OSError) else None) or error
        raise WeightsError(f"{path} cannot be written: {reason}; nothing of it is kept") from None
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def whole_state(model: nn.Module) -> dict[str, Tensor]:
    """Return every parameter and persistent buffer of a model by name: all that must be written."""
    return {unwrapped(name): tensor for name, tensor in model.state_dict().items()}


def gather(parameters: Mapping[str, Tensor], name: str) -> Tensor:
    """Return a whole parameter, gathered if it is sharded."""
    parameter = parameters[name]
    return parameter.full_tensor() if is_sharded(parameter) else parameter.detach()


def dtypes(parameters: Mapping[str, Tensor], dtype: torch.dtype | None) -> dict[str, torch.dtype]:
    """Return the dtype to write each parameter in: `dtype`, or the parameter's own."""
    return {name: dtype or parameter.dtype for name, parameter in parameters.items()}


def write_weights(
    folder: Path,
    folder_map: FolderMap,
    parameter: Callable[[str], Tensor],
    dtypes: Mapping[str, torch.dtype],
    shard_bytes: int,
    report: Report = silent,
) -> None:
    """Write tensors in shards of at most `shard_bytes` bytes, and an index if there are several.

    `parameter` returns a parameter by name; it is called again only when all pieces of the last
    one are written. `dtypes` are those in the file, by parameter.
    """
    sizes = {key: _numel(parts) * dtypes[parts[0][0]].itemsize for key, parts in folder_map.items()}
    shards = list(_shards(sizes, shard_bytes))
    weight_map: dict[str, str] = {}
    report(0, sum(sizes.values()))
    cached = _LastParameter(parameter)
    total = 0
    not_finite: list[str] = []
    for number, keys in enumerate(shards, 1):
        name = SINGLE if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors = {key: _tensor(folder_map[key], cached, dtypes, not_finite) for key in keys}
        save_tensors(tensors, folder / name)
        total += sum(t.nbytes for t in tensors.values())
        weight_map |= dict.fromkeys(keys, name)
        report(total, sum(sizes.values()))
    if not_finite:
        log.warning("%s holds nan or inf, which is written as it is", not_finite[0])
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")


def save_tensors(
    tensors: dict[str, Tensor], path: Path, notes: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file for the readers of its folder; safetensors' own mode is 0600.

    `notes` are added to its metadata.
    """
    save_file(tensors, path, {"format": "pt"} | dict(notes or {}))
    path.chmod(path.parent.stat().st_mode & 0o666)


class _LastParameter:
    """Returns parameters by name and caches the last one."""

    def __init__(self, parameter: Callable[[str], Tensor]):
        self._parameter = parameter
        self._name = ""
        self._value = torch.empty(0)

    def __call__(self, name: str) -> Tensor:
        if name != self._name:
            self._value = torch.empty(0)  # free the last one before the next is allocated
            self._value = self._parameter(name)
            self._name = name
        return self._value


def _shards(sizes: Mapping[str, int], max_bytes: int) -> Iterator[list[str]]:
    """Split tensors, in order, into files of at most `max_bytes`, or of one larger tensor."""
    keys: list[str] = []
    filled = 0
    for key, size in sizes.items():
        if keys and filled + size > max_bytes:
            yield keys
            keys = []
            filled = 0
        keys.append(key)
        filled += size
    yield keys


def _tensor(
    parts: list[tuple[str, Piece]],
    parameter: Callable[[str], Tensor],
    dtypes: Mapping[str, torch.dtype],
    not_finite: list[str],
) -> Tensor:
    """Build a tensor of the file from its parts. Appends parameters with nan or inf."""
    first_name, first_piece = parts[0]
    out = torch.empty(first_piece.shape, dtype=dtypes[first_name], device="cpu")
    for name, piece in parts:
        target = out[slices(piece.file_box)]
        source = piece.orient(parameter(name)[slices(piece.box)])
        if not check_cast(source, out.dtype, name, "write another dtype, such as --dtype bfloat16"):
            not_finite.append(name)
        target.copy_(source.reshape(target.shape))
    return out


def _numel(parts: list[tuple[str, Piece]]) -> int:
    return torch.Size(parts[0][1].shape).numel()
