"""How a tensor of ours is put together from tensors of a file: a list of boxes, each one moved whole or transposed.

The operations below say which boxes; reading, resharding and writing follow from the boxes alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from tokenyard_models.config import TransformerConfig

Box = tuple[tuple[int, int], ...]
"""(first, end) of each dimension."""


@dataclass(frozen=True)
class Piece:
    """A box of one of our tensors, and the box of a file's tensor that it is."""

    key: str  # the tensor's name in the file
    shape: tuple[int, ...]  # the whole tensor's, in the file
    ours: Box
    theirs: Box
    transposed: bool = False  # the last two dimensions are the other way round in the file

    def within(self, box: Box) -> Piece | None:
        """Return the part of this piece that lies within a box of ours; None if there is none."""
        cut = tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(self.ours, box))
        if any(a >= b for a, b in cut):
            return None
        inside = [(a - first, b - first) for (a, b), (first, _) in zip(cut, self.ours)]
        inside = inside[
            len(inside) - len(self.theirs) :
        ]  # leading dimensions that a file does not have are 1 here
        if self.transposed:
            inside[-2:] = inside[:-3:-1]
        theirs = tuple((first + a, first + b) for (first, _), (a, b) in zip(self.theirs, inside))
        return Piece(self.key, self.shape, cut, theirs, self.transposed)

    def turned(self, tensor: Tensor) -> Tensor:
        """Return what was read as it lies in ours, or what lies in ours as it is written."""
        return tensor.transpose(-1, -2) if self.transposed else tensor


def whole(shape: Sequence[int]) -> Box:
    """Return the box of a whole tensor."""
    return tuple((0, size) for size in shape)


def slices(box: Box) -> tuple[slice, ...]:
    """Return a box as an index."""
    return tuple(slice(first, end) for first, end in box)


Operation = Callable[[Sequence[str], tuple[int, ...], TransformerConfig], Iterator[Piece]]
"""(names in the file, the shape of ours, the model) -> pieces."""


def same(keys: Sequence[str], shape: tuple[int, ...], config: TransformerConfig) -> Iterator[Piece]:
    """One tensor as it is."""
    yield Piece(keys[0], shape, whole(shape), whole(shape))


def heads(
    keys: Sequence[str], shape: tuple[int, ...], config: TransformerConfig
) -> Iterator[Piece]:
    """Queries, keys and values [heads * head_dim, D], one below the other."""
    first = 0
    for key, count in zip(keys, (config.heads, config.kv_heads, config.kv_heads)):
        height = count * config.head_dim
        yield Piece(
            key,
            (height, shape[1]),
            ((first, first + height), (0, shape[1])),
            whole((height, shape[1])),
        )
        first += height


def below(
    keys: Sequence[str], shape: tuple[int, ...], config: TransformerConfig
) -> Iterator[Piece]:
    """Tensors [F, D] of one height, one below the other."""
    height = shape[0] // len(keys)
    for i, key in enumerate(keys):
        yield Piece(
            key,
            (height, shape[1]),
            ((i * height, (i + 1) * height), (0, shape[1])),
            whole((height, shape[1])),
        )


def by_expert(
    keys: Sequence[str], shape: tuple[int, ...], config: TransformerConfig
) -> Iterator[Piece]:
    """For each expert, tensors of its own, one below the other."""
    experts, height, width = shape[0], shape[1] // len(keys), shape[2]
    for e in range(experts):
        for i, key in enumerate(keys):
            ours = ((e, e + 1), (i * height, (i + 1) * height), (0, width))
            yield Piece(key.format(expert=e), (height, width), ours, whole((height, width)))


def stacked(
    keys: Sequence[str], shape: tuple[int, ...], config: TransformerConfig
) -> Iterator[Piece]:
    """Tensors [E F, D] of all experts, one expert below the other (MegaBlocks' w1 and, of gated experts, v1)."""
    experts, width = shape[0], shape[2]
    height = config.moe.ffn_dim if config.moe is not None else shape[1]
    for e in range(experts):
        for i, key in enumerate(keys[: shape[1] // height]):
            ours = ((e, e + 1), (i * height, (i + 1) * height), (0, width))
            yield Piece(
                key, (experts * height, width), ours, ((e * height, (e + 1) * height), (0, width))
            )


def stacked_transposed(
    keys: Sequence[str], shape: tuple[int, ...], config: TransformerConfig
) -> Iterator[Piece]:
    """A tensor [E F, D] of all experts, each transposed (MegaBlocks' w2)."""
    experts, dim, ffn_dim = shape
    for e in range(experts):
        theirs = ((e * ffn_dim, (e + 1) * ffn_dim), (0, dim))
        yield Piece(
            keys[0],
            (experts * ffn_dim, dim),
            ((e, e + 1), (0, dim), (0, ffn_dim)),
            theirs,
            transposed=True,
        )
