"""How large the tiles of each product are on Hopper: from a table, or from what tuning found on this machine.

The shipped table was measured on one H200, and what differs on an H100 there. No training step ever tries tiles;
``python -m tokenyard_kernels_triton`` does, and keeps what it finds in a file, which is read once, at the first launch.
"""

from __future__ import annotations

import functools
import json
import logging
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from tokenyard import cache_folder
from tokenyard_kernels_triton._device import triton_version

Product = Literal[
    "up", "down", "activation_gradient", "input_gradient", "up_gradient", "down_gradient"
]
PRODUCTS: tuple[Product, ...] = get_args(Product)

CHUNKS = (32, 64, 128)  # columns that can leave at a time
_SHARED = 232448  # bytes of shared memory that a program can have
_ALIGNING = 1024  # of them, for barriers and alignment
_FINE = 4096  # experts narrower than this are many and small

log = logging.getLogger("tokenyard")


@dataclass(frozen=True)
class GluonTiling:
    """The tile of one product on Hopper: 128 rows by `columns` of the output."""

    stages: int = 3  # slices that are loaded ahead
    chunk: int = 64  # columns that leave at a time
    buffers: int = 1  # of so many columns
    columns: int = 256
    depth: int = 64
    group: int = 32  # row tiles that one column of weights is used for while it is in cache

    def options(self) -> dict[str, int]:
        """Return what every product's launch takes."""
        return {
            "COLUMNS": self.columns,
            "DEPTH": self.depth,
            "CHUNK": self.chunk,
            "STAGES": self.stages,
            "BUFFERS": self.buffers,
        }

    def shared(self, product: Product) -> int:
        """Return the bytes of shared memory that a product takes with it; up sends three results of a column."""
        sent = 3 if product == "up" else 1
        slices = self.stages * self.depth * (128 + self.columns)
        return 2 * (slices + 2 * 64 * self.buffers * sent * self.chunk) + _ALIGNING

    def fits(self, product: Product) -> bool:
        """Say whether a program can run a product with it."""
        same = (self.columns, self.depth) == (GluonTiling.columns, GluonTiling.depth)
        return same and self.chunk in CHUNKS and self.shared(product) <= _SHARED


# For fine experts, and for wide ones. Products over rows that share a group share their tile list.
_TABLE: dict[Product, tuple[GluonTiling, GluonTiling]] = {
    "up": (GluonTiling(3, 64, 1, group=16), GluonTiling(3, 64, 1)),
    "down": (GluonTiling(3, 128, 2, group=16), GluonTiling(3, 128, 2)),
    "activation_gradient": (GluonTiling(3, 128, 2, group=16), GluonTiling(3, 128, 2)),
    "input_gradient": (GluonTiling(4, 64, 2, group=16), GluonTiling(4, 64, 2)),
    "up_gradient": (GluonTiling(4, 64, 2, group=16), GluonTiling(4, 64, 2, group=16)),
    "down_gradient": (GluonTiling(4, 64, 2, group=4), GluonTiling(4, 64, 2, group=16)),
}
# Wide experts on an H100, whose memory is slower: in a layer, not alone, the tile above takes up to half as long again.
_WIDE_ON_H100: dict[Product, GluonTiling] = {"input_gradient": GluonTiling(3, 32, 1, group=16)}


def gluon_tiling(product: Product, dim: int, ffn_dim: int, device: torch.device) -> GluonTiling:
    """Return the tiles of a product between the model's width and the experts'.

    Where the gradient of the pre-activation is an operand (input_gradient, up_gradient), its width counts: gate and up.
    """
    gpu = gpu_key(device)
    return _tuned(gpu).get(bucket(product, dim, ffn_dim)) or _shipped(
        gpu, product, ffn_dim >= _FINE
    )


def _shipped(gpu: str, product: Product, wide: bool) -> GluonTiling:
    other = _WIDE_ON_H100.get(product) if wide and "H100" in gpu else None
    return other or _TABLE[product][wide]


def bucket(product: Product, dim: int, ffn_dim: int) -> str:
    """Return what tuned tiles are filed under: the product, and both widths rounded up to a power of two."""
    return f"{product} {1 << (dim - 1).bit_length()} {1 << (ffn_dim - 1).bit_length()}"


@functools.cache
def gpu_key(device: torch.device) -> str:
    """Return which GPU and compiler tuned tiles are good for."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return f"{name}, Triton {triton_version()}"


def tuned_path() -> Path:
    """Return the file of tuned tiles."""
    return cache_folder() / "triton_tiles.json"


def keep_tuned(gpu: str, tiles: dict[str, GluonTiling]) -> Path:
    """Add tiles by bucket to the file, in place of older ones of the same GPU and bucket; return its path."""
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
    return {name: t for name, t in tiles.items() if t is not None and t.fits(name.split()[0])}  # type: ignore[arg-type]


def _read(path: Path) -> dict[str, Any]:
    try:
        known = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError) as error:
        log.warning("tuned tiles in %s are left aside, since they cannot be read: %s", path, error)
        return {}
    return (
        known
        if isinstance(known, dict) and all(isinstance(v, dict) for v in known.values())
        else {}
    )


def _tiling(entry: object) -> GluonTiling | None:
    names = {field.name for field in fields(GluonTiling)}
    if (
        not isinstance(entry, dict)
        or set(entry) != names
        or not all(type(v) is int and v > 0 for v in entry.values())
    ):
        return None
    return GluonTiling(**entry)
