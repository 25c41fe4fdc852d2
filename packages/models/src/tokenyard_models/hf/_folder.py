"""Read a Hugging Face folder: config.json, and boxes of tensors in safetensors files.

Nothing in the folder is executed, and nothing outside the folder is read.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from tokenyard import TokenyardError, bounded
from tokenyard.bounded import require_plain

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
STORED_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
_ADAPTERS = ("adapter_model.safetensors", "adapter_model.bin")
_PICKLES = ("*.bin", "*.pt", "*.pth")

# Bytes to read before reopening a file: mapped pages count as memory until the file is closed.
_REOPEN_AFTER = 1 << 28


def is_hf_folder(path: Path) -> bool:
    """Return whether a folder is that of a model: whether it has a config.json."""
    return (path / CONFIG).exists()


def has_weights(path: Path) -> bool:
    """Return whether a folder holds safetensors files of a model."""
    return (path / INDEX).exists() or (path / SINGLE).exists()


class WeightsError(TokenyardError):
    """A folder of weights is incomplete, unsafe, or for another model."""


class Folder:
    """A folder with a model's config.json and weights. Raises WeightsError for any other folder.

    `config` is the name of the file that describes the model. Without one, the folder holds weights
    alone.
    """

    def __init__(self, path: Path | str, config: str | None = CONFIG):
        self.path = Path(path)
        if str(path).startswith("hf:/"):
            raise WeightsError(f"{path} is the form of load_path; leave hf:// out here")
        if not self.path.is_dir():
            raise WeightsError(
                f"{self.path} is no folder; give one that holds config.json and model.safetensors "
                "(models of the hub are not downloaded: use hf download)"
            )
        self.config = {} if config is None else read_json(self.path / config)
        self._described_by = config or "the model"
        self.files = self._files()  # file name -> tensor names
        self._refuse_unused_files()

    @property
    def keys(self) -> set[str]:
        """Return the names of all tensors."""
        return {key for keys in self.files.values() for key in keys}

    def _files(self) -> dict[str, list[str]]:
        if (self.path / INDEX).exists():
            return self._indexed(read_json(self.path / INDEX).get("weight_map"))
        if (self.path / SINGLE).exists():
            return {SINGLE: list(_open(self.path / SINGLE).keys())}
        pickles = sorted(p.name for pattern in _PICKLES for p in self.path.glob(pattern))
        if pickles:
            raise WeightsError(
                f"{self.path} has weights as pickles ({pickles[0]}), which can run code when they "
                "are read; convert them where you trust them: load the model by transformers and "
                "save it by save_pretrained"
            )
        raise WeightsError(f"{self.path} holds neither {INDEX} nor {SINGLE}")

    def _indexed(self, weight_map: Any) -> dict[str, list[str]]:
        """Return the tensor names of each file. Raises WeightsError if index and files differ."""
        index = self.path / INDEX
        if not isinstance(weight_map, dict) or not weight_map:
            raise WeightsError(
                f"{index} has no weight_map, which says in which file each tensor is"
            )
        files: dict[str, list[str]] = {}
        for key, name in weight_map.items():
            if not _is_file_name(name):
                raise WeightsError(
                    f"{index} sends {key} to {name!r}, which is no safetensors file in the folder"
                )
            files.setdefault(name, []).append(key)
        for name, keys in files.items():
            self._compare(name, keys)
        return files

    def _refuse_unused_files(self) -> None:
        """Raise WeightsError for adapters, and for weights beside those that are read."""
        patterns = (SINGLE, "model-*-of-*.safetensors")
        unused = {p.name for pattern in patterns for p in self.path.glob(pattern)}
        unused -= self.files.keys()
        if unused:
            raise WeightsError(
                f"{self.path} holds {min(unused)}, which the index does not list; "
                "remove the file, or list it there"
            )
        for name in _ADAPTERS:
            if (self.path / name).exists():
                raise WeightsError(
                    f"{self.path} holds {name}, and adapters are not read; merge them into the "
                    "weights (merge_and_unload of peft), or remove the file"
                )

    def _compare(self, name: str, indexed: list[str]) -> None:
        stored = set(_open(self.path / name).keys())
        if missing := sorted(set(indexed) - stored):
            raise WeightsError(
                f"{self.path / name} lacks {missing[0]}, which {INDEX} says is there"
            )
        if extra := sorted(stored - set(indexed)):
            raise WeightsError(
                f"{INDEX} of {self.path} does not list {extra[0]}, which is in {name}"
            )

    def check(self, key: str, shape: tuple[int, ...], file: Any, name: str) -> None:
        """Raise WeightsError unless a tensor has this shape and a floating-point dtype."""
        tensor = file.get_slice(key)
        stored = list(tensor.get_shape())
        if tuple(stored) != shape:
            raise WeightsError(
                f"{key} in {self.path / name} is {stored}, and {self._described_by} makes it "
                f"{list(shape)}"
            )
        if tensor.get_dtype() not in STORED_BYTES:
            raise WeightsError(
                f"{key} in {self.path / name} is {tensor.get_dtype()}; weights are read in "
                f"{', '.join(STORED_BYTES)}, and quantised ones not at all"
            )

    def stored_dtype(self) -> str:
        """Return the dtype of the first tensor, as safetensors names it."""
        name, keys = next(iter(self.files.items()))
        dtype: str = self.reader(name).file.get_slice(keys[0]).get_dtype()
        return dtype

    def stored_wider(self, itemsize: int) -> list[str]:
        """Return the tensors whose stored dtype has more bytes than `itemsize`."""
        return [
            key
            for name, keys in self.files.items()
            for file in (self.reader(name).file,)
            for key in keys
            if STORED_BYTES.get(file.get_slice(key).get_dtype(), 0) > itemsize
        ]

    def reader(self, name: str) -> Reader:
        """Open a file of the folder."""
        return Reader(self.path / name)


class Reader:
    """Reads boxes of tensors from a file without keeping them in memory."""

    def __init__(self, path: Path):
        self.path = path
        self.file = _open(path)
        self._bytes_read = 0

    def read(self, key: str, box: tuple[slice, ...]) -> Tensor:
        """Return a box of a tensor. Raises WeightsError if the file cannot be read."""
        if self._bytes_read > _REOPEN_AFTER:
            self.file = _open(self.path)
            self._bytes_read = 0
        try:
            tensor: Tensor = self.file.get_slice(key)[box]
        except (SafetensorError, OSError) as error:
            raise WeightsError(f"{key} in {self.path} cannot be read: {error}") from None
        self._bytes_read += tensor.nbytes
        return tensor


def _is_file_name(name: Any) -> bool:
    """Return whether an index entry names a safetensors file inside the folder."""
    return isinstance(name, str) and Path(name).name == name and name.endswith(".safetensors")


def _open(path: Path) -> Any:
    require_plain(path, WeightsError)
    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError:
        raise WeightsError(f"{path} does not exist, and the folder's index names it") from None
    except (SafetensorError, OSError) as error:
        raise WeightsError(
            f"{path} is not a whole safetensors file ({error}); copy it anew"
        ) from None


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object of a plain file. Raises WeightsError, see `tokenyard.bounded`."""
    if not path.exists():
        raise WeightsError(f"{path} does not exist; give a folder that holds {path.name}")
    return bounded.read_json(path, error=WeightsError)
