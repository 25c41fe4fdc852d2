"""The tile sizes of each matmul on Hopper GPUs: from a table, or from a file of tuned ones.

The table was measured on one H200, and its entries for an H100 on an H100. Training never tries
other tiles. ``python -m tokenyard_kernels_triton`` tries them and writes the file. The first launch
reads the file, once.
"""

from __future__ import annotations

import functools
import json
import logging
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch

from tokenyard import cache_folder
from tokenyard_kernels_triton._device import triton_version

Matmul = Literal[
    "up", "down", "activation_gradient", "input_gradient", "up_gradient", "down_gradient"
]
"""A matmul of an expert layer: two of the forward pass, four of the backward pass."""

MATMULS: tuple[Matmul, ...] = get_args(Matmul)

CHUNKS = (32, 64, 128)  # numbers of columns that can be stored at a time
_SHARED = 232448  # bytes of shared memory of a program
_RESERVED = 1536  # of them, for barriers, numbers of tiles and alignment
_WIDE = 4096  # expert width from which the table's second column applies
_VERY_FINE = 256  # expert width up to which the tiles of very fine experts apply

log = logging.getLogger("tokenyard")


@dataclass(frozen=True)
class GluonTiling:
    """The tile of one matmul on Hopper GPUs: 128 rows by `columns` of the output."""

    stages: int = 3  # slices loaded ahead
    chunk: int = 64  # columns stored at a time
    buffers: int = 1  # of `chunk` columns, for each warp group
    columns: int = 256
    depth: int = 64  # of a slice of the reduction dimension
    group: int = 32  # row tiles that use a column tile of the weights while it is in cache

    def options(self) -> dict[str, int]:
        """Return the arguments of every matmul's launch."""
        return {
            "COLUMNS": self.columns,
            "DEPTH": self.depth,
            "CHUNK": self.chunk,
            "STAGES": self.stages,
            "BUFFERS": self.buffers,
        }

    def shared(self, matmul: Matmul) -> int:
        """Return the bytes of shared memory that a matmul takes with this tile."""
        results = 3 if matmul == "up" else 1  # up stores gate, up and activation
        slices = self.stages * self.depth * (128 + self.columns)
        return 2 * (slices + 2 * 64 * self.buffers * results * self.chunk) + _RESERVED

    def fits(self, matmul: Matmul) -> bool:
        """Return whether a program can run a matmul with this tile."""
        same = (self.columns, self.depth) == (GluonTiling.columns, GluonTiling.depth)
        return same and self.chunk in CHUNKS and self.shared(matmul) <= _SHARED


# (fine experts, wide experts). Matmuls over rows share their tile list if they have the same group.
_TABLE: dict[Matmul, tuple[GluonTiling, GluonTiling]] = {
    "up": (GluonTiling(3, 64, 1, group=16), GluonTiling(3, 64, 1)),
    "down": (GluonTiling(3, 128, 2, group=16), GluonTiling(3, 128, 2)),
    "activation_gradient": (GluonTiling(3, 128, 2, group=16), GluonTiling(3, 128, 2)),
    "input_gradient": (GluonTiling(4, 64, 2, group=16), GluonTiling(4, 64, 2)),
    "up_gradient": (GluonTiling(4, 64, 2, group=16), GluonTiling(4, 64, 2, group=16)),
    "down_gradient": (GluonTiling(4, 64, 2, group=4), GluonTiling(4, 64, 2, group=16)),
}
# Very fine experts, whose down matmul sums over few slices: 10 % less time on an H200.
_OF_VERY_FINE: dict[Matmul, GluonTiling] = {"down": GluonTiling(4, 64, 2, group=16)}
# Wide experts on an H100, whose memory is slower. In a layer (not alone), the tile in the table
# takes up to 1.5 times as long.
_WIDE_ON_H100: dict[Matmul, GluonTiling] = {"input_gradient": GluonTiling(3, 32, 1, group=16)}


def gluon_tiling(matmul: Matmul, dim: int, ffn_dim: int, device: torch.device) -> GluonTiling:
    """Return the tile of a matmul between the model width and the expert width: tuned, or shipped.

    In input_gradient and up_gradient, where the gradient of the pre-activation is an operand,
    ffn_dim is that gradient's width: gate and up together.
    """
    gpu = gpu_key(device)
    tuned = _tuned(gpu).get(bucket(matmul, dim, ffn_dim))
    return tuned or _shipped(gpu, matmul, ffn_dim)


def _shipped(gpu: str, matmul: Matmul, ffn_dim: int) -> GluonTiling:
    wide = ffn_dim >= _WIDE
    override = _OF_VERY_FINE.get(matmul) if ffn_dim <= _VERY_FINE else None
    if wide and "H100" in gpu:
        override = _WIDE_ON_H100.get(matmul)
    return override or _TABLE[matmul][wide]


def bucket(matmul: Matmul, dim: int, ffn_dim: int) -> str:
    """Return the key of tuned tiles: the matmul, and both widths rounded up to a power of two."""
    return f"{matmul} {1 << (dim - 1).bit_length()} {1 << (ffn_dim - 1).bit_length()}"


@functools.cache
def gpu_key(device: torch.device) -> str:
    """Return the GPU and compiler that tuned tiles are valid for."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return f"{name}, Triton {triton_version()}"


def tuned_path() -> Path:
    """Return the path of the file of tuned tiles."""
    return cache_folder() / "triton_tiles.json"


def keep_tuned(gpu: str, tiles: dict[str, GluonTiling]) -> Path:
    """Add tiles by bucket to the file and return its path.

    They replace older ones of the same GPU and bucket.
    """
    path = tuned_path()
    known = _read(path)
    known[gpu] = known.get(gpu, {}) | {name: asdict(tiling) for name, tiling in tiles.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(f".{os.getpid()}")
    new.write_text(json.dumps(known, indent=1))
    new.replace(path)
    _tuned.cache_clear()
    return path


@functools.cache
def _tuned(gpu: str) -> dict[str, GluonTiling]:
    entries = _read(tuned_path()).get(gpu, {})
    tiles = {name: _tiling(entry) for name, entry in entries.items()}
    return {name: t for name, t in tiles.items() if t is not None and t.fits(_matmul_of(name))}


def _matmul_of(bucket_name: str) -> Matmul:
    return cast(Matmul, bucket_name.split()[0])


def _read(path: Path) -> dict[str, Any]:
    try:
        known = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError) as error:
        log.warning("tuned tiles in %s are left aside, since they cannot be read: %s", path, error)
        return {}
    valid = isinstance(known, dict) and all(isinstance(v, dict) for v in known.values())
    return known if valid else {}


def _tiling(entry: object) -> GluonTiling | None:
    """Return an entry of the file as a tile, or None if it is not one."""
    names = {field.name for field in fields(GluonTiling)}
    if not isinstance(entry, dict) or set(entry) != names:
        return None
    if not all(type(value) is int and value > 0 for value in entry.values()):
        return None
    return GluonTiling(**entry)
