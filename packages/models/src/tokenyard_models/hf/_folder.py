"""A Hugging Face folder as it lies on disk: config.json, and tensors in safetensors files, read a box at a time.

Nothing in it is run, and nothing outside of it is read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from tokenyard import TokenyardError

INDEX, SINGLE, CONFIG = "model.safetensors.index.json", "model.safetensors", "config.json"
_MAX_JSON = 1 << 26
_DTYPES = ("F64", "F32", "F16", "BF16")
_AT_ONCE = (
    1 << 28
)  # bytes that are read before a file is opened anew: what was mapped counts as memory until then


class WeightsError(TokenyardError):
    """A folder of weights is not whole, not safe, or not of the model."""


class Folder:
    """A folder with a model's config.json and weights. Raises WeightsError for one that is none."""

    def __init__(self, path: Path | str):
        self.path = Path(path)
        if not self.path.is_dir():
            raise WeightsError(
                f"{self.path} is no folder; give one that holds config.json and model.safetensors"
            )
        self.config = read_json(self.path / CONFIG)
        self.files = self._files()  # the names of tensors in each file

    @property
    def keys(self) -> set[str]:
        """Return the names of all tensors."""
        return {key for keys in self.files.values() for key in keys}

    def _files(self) -> dict[str, list[str]]:
        if (self.path / INDEX).exists():
            return self._indexed(read_json(self.path / INDEX).get("weight_map"))
        if (self.path / SINGLE).exists():
            return {SINGLE: list(_open(self.path / SINGLE).keys())}
        pickles = sorted(
            p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in self.path.glob(pattern)
        )
        if pickles:
            raise WeightsError(
                f"{self.path} has weights as pickles ({pickles[0]}), which can run code when they are read; convert "
                "them where you trust them: load the model by transformers and save it by save_pretrained"
            )
        raise WeightsError(f"{self.path} holds neither {INDEX} nor {SINGLE}")

    def _indexed(self, weight_map: Any) -> dict[str, list[str]]:
        where = self.path / INDEX
        if not isinstance(weight_map, dict) or not weight_map:
            raise WeightsError(
                f"{where} has no weight_map, which says in which file each tensor is"
            )
        found: dict[str, list[str]] = {}
        for key, name in weight_map.items():
            if (
                not isinstance(name, str)
                or Path(name).name != name
                or not name.endswith(".safetensors")
            ):
                raise WeightsError(
                    f"{where} sends {key} to {name!r}, which is no safetensors file in the folder"
                )
            found.setdefault(name, []).append(key)
        for name, keys in found.items():
            self._compare(name, keys)
        return found

    def _compare(self, name: str, keys: list[str]) -> None:
        there = set(_open(self.path / name).keys())
        if missing := sorted(set(keys) - there):
            raise WeightsError(
                f"{self.path / name} lacks {missing[0]}, which {INDEX} says is there"
            )
        if extra := sorted(there - set(keys)):
            raise WeightsError(
                f"{INDEX} of {self.path} does not list {extra[0]}, which is in {name}"
            )

    def check(self, key: str, shape: tuple[int, ...], file: Any, name: str) -> None:
        """Raise WeightsError unless a tensor has this shape, and numbers that can be read."""
        tensor = file.get_slice(key)
        if tuple(tensor.get_shape()) != shape:
            found = list(tensor.get_shape())
            raise WeightsError(
                f"{key} in {self.path / name} is {found}, and config.json makes it {list(shape)}"
            )
        if tensor.get_dtype() not in _DTYPES:
            raise WeightsError(
                f"{key} in {self.path / name} is {tensor.get_dtype()}; weights are read in {', '.join(_DTYPES)}, and "
                "quantised ones not at all"
            )

    def stored_dtype(self) -> str:
        """Return the dtype of the first tensor, by safetensors' name of it."""
        name, keys = next(iter(self.files.items()))
        dtype: str = self.reader(name).file.get_slice(keys[0]).get_dtype()
        return dtype

    def reader(self, name: str) -> Reader:
        """Return what reads boxes of tensors from a file."""
        return Reader(self.path / name)


class Reader:
    """Reads boxes of tensors; what it has read does not stay in memory."""

    def __init__(self, path: Path):
        self.path, self._read, self.file = path, 0, _open(path)

    def read(self, key: str, box: tuple[slice, ...]) -> Tensor:
        """Return a box of a tensor. Raises WeightsError if the file cannot be read."""
        if self._read > _AT_ONCE:
            self.file, self._read = _open(self.path), 0
        try:
            tensor: Tensor = self.file.get_slice(key)[box]
        except (SafetensorError, OSError) as error:
            raise WeightsError(f"{key} in {self.path} cannot be read: {error}") from None
        self._read += tensor.nbytes
        return tensor


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError:
        raise WeightsError(f"{path} does not exist, and the folder's index names it") from None
    except (SafetensorError, OSError) as error:
        raise WeightsError(
            f"{path} is not a whole safetensors file ({error}); copy it anew"
        ) from None


def read_json(path: Path) -> dict[str, Any]:
    """Return a file's JSON object. Raises WeightsError if it is none, or too large."""
    try:
        if path.stat().st_size > _MAX_JSON:
            raise WeightsError(
                f"{path} has {path.stat().st_size} bytes; at most {_MAX_JSON} are read"
            )
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise WeightsError(f"{path} does not exist; give a folder that holds {path.name}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise WeightsError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, Mapping):
        raise WeightsError(f"{path} is not a JSON object")
    return dict(content)
