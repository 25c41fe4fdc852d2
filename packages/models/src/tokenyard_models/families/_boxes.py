"""Map boxes of a model's parameters to boxes of the tensors in a file.

An operation lists the boxes of one parameter. Loading, resharding and writing use the boxes alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from tokenyard_models.config import TransformerConfig

Shape = tuple[int, ...]

Box = tuple[tuple[int, int], ...]
"""(start, end) of each dimension."""


@dataclass(frozen=True)
class Piece:
    """A box of a parameter, and the box of a file's tensor that holds the same numbers."""

    key: str  # name of the tensor in the file
    shape: Shape  # of the whole tensor in the file
    box: Box  # in the parameter
    file_box: Box  # in the file's tensor
    transposed: bool = False  # the file swaps the last two dimensions

    def within(self, box: Box) -> Piece | None:
        """Return the part of this piece inside a box of the parameter, or None."""
        cut = tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(self.box, box))
        if any(start >= end for start, end in cut):
            return None
        offsets = [(a - start, b - start) for (a, b), (start, _) in zip(cut, self.box)]
        # Leading dimensions that the file lacks have size 1 here.
        offsets = offsets[len(offsets) - len(self.file_box) :]
        if self.transposed:
            offsets[-2:] = offsets[:-3:-1]
        file_box = tuple(
            (start + a, start + b) for (start, _), (a, b) in zip(self.file_box, offsets)
        )
        return Piece(self.key, self.shape, cut, file_box, self.transposed)

    def orient(self, tensor: Tensor) -> Tensor:
        """Convert between the file's and the parameter's order of dimensions (its own inverse)."""
        return tensor.transpose(-1, -2) if self.transposed else tensor


def full_box(shape: Sequence[int]) -> Box:
    """Return the box that covers a whole tensor."""
    return tuple((0, size) for size in shape)


def slices(box: Box) -> tuple[slice, ...]:
    """Convert a box to an index."""
    return tuple(slice(start, end) for start, end in box)


Operation = Callable[[Sequence[str], Shape, TransformerConfig], Iterator[Piece]]
"""(names in the file, shape of the parameter, config) -> pieces."""


def copy(keys: Sequence[str], shape: Shape, config: TransformerConfig) -> Iterator[Piece]:
    """Map one tensor unchanged."""
    yield Piece(keys[0], shape, full_box(shape), full_box(shape))


def swapped(keys: Sequence[str], shape: Shape, config: TransformerConfig) -> Iterator[Piece]:
    """Map one tensor [E, M, N] to [E, N, M] (MegaBlocks' w1 and w2 of layers with a capacity)."""
    experts, rows, columns = shape
    file_shape = (experts, columns, rows)
    yield Piece(keys[0], file_shape, full_box(shape), full_box(file_shape), transposed=True)


def concat_heads(keys: Sequence[str], shape: Shape, config: TransformerConfig) -> Iterator[Piece]:
    """Concatenate query, key and value rows: each [heads * head_dim, D]."""
    width = shape[1]
    start = 0
    for key, heads in zip(keys, (config.heads, config.kv_heads, config.kv_heads)):
        height = heads * config.head_dim
        box = ((start, start + height), (0, width))
        yield Piece(key, (height, width), box, full_box((height, width)))
        start += height


def concat(keys: Sequence[str], shape: Shape, config: TransformerConfig) -> Iterator[Piece]:
    """Concatenate tensors [F, D], or biases [F], of equal height."""
    height = shape[0] // len(keys)
    part = (height, *shape[1:])
    for i, key in enumerate(keys):
        box = ((i * height, (i + 1) * height), *full_box(shape[1:]))
        yield Piece(key, part, box, full_box(part))


def per_expert(keys: Sequence[str], shape: Shape, config: TransformerConfig) -> Iterator[Piece]:
    """Concatenate the tensors of each expert; `{expert}` in a key is the expert's number."""
    experts, rows, width = shape
    height = rows // len(keys)
    for e in range(experts):
        for i, key in enumerate(keys):
            box = ((e, e + 1), (i * height, (i + 1) * height), (0, width))
            yield Piece(key.format(expert=e), (height, width), box, full_box((height, width)))


def stacked(keys: Sequence[str], shape: Shape, config: TransformerConfig) -> Iterator[Piece]:
    """Split tensors [E F, D] by expert (MegaBlocks' w1, and v1 if the experts are gated)."""
    experts, rows, width = shape
    height = config.moe.ffn_dim if config.moe is not None else rows
    for e in range(experts):
        for i, key in enumerate(keys[: rows // height]):
            box = ((e, e + 1), (i * height, (i + 1) * height), (0, width))
            file_box = ((e * height, (e + 1) * height), (0, width))
            yield Piece(key, (experts * height, width), box, file_box)


def stacked_transposed(
    keys: Sequence[str], shape: Shape, config: TransformerConfig
) -> Iterator[Piece]:
    """Split a tensor [E F, D] by expert and transpose each part (MegaBlocks' w2)."""
    experts, dim, ffn_dim = shape
    for e in range(experts):
        box = ((e, e + 1), (0, dim), (0, ffn_dim))
        file_box = ((e * ffn_dim, (e + 1) * ffn_dim), (0, dim))
        yield Piece(keys[0], (experts * ffn_dim, dim), box, file_box, transposed=True)
