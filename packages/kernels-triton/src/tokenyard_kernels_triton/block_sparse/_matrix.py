"""A block-sparse matrix, and matmuls with it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from tokenyard.errors import ConfigError
from tokenyard_kernels_triton.block_sparse import reference
from tokenyard_kernels_triton.block_sparse._ops import TYPES, dsd_op, sdd_op
from tokenyard_kernels_triton.block_sparse._topology import Topology, topology_of_mask


@dataclass(frozen=True)
class BlockSparse:
    """A matrix of which only some blocks of B x B are stored: those of its topology.

    ``matrix @ dense``, ``dense @ matrix`` and ``matrix.T`` work as for dense matrices, and are
    differentiable in `data` and in the dense matrix. Gradients have the same topology. Code for
    ``torch.compile`` calls `dsd` and `dds` instead of ``@``.
    """

    data: Tensor  # [blocks, B, B], in the topology's order; zero in its tail
    topology: Topology
    transposed: bool = False  # the matrix is the transpose of what is stored

    def __post_init__(self) -> None:
        want = (self.topology.blocks, self.topology.block, self.topology.block)
        if tuple(self.data.shape) != want:
            raise ConfigError(
                f"data is {list(self.data.shape)}, but the topology stores {list(want)}"
            )

    @property
    def shape(self) -> tuple[int, int]:
        """The shape [M, N] of the matrix."""
        rows, columns = self.topology.shape
        return (columns, rows) if self.transposed else (rows, columns)

    @property
    def T(self) -> BlockSparse:
        """The transpose. It shares `data`."""
        return replace(self, transposed=not self.transposed)

    def __matmul__(self, dense: Tensor) -> Tensor:
        return dsd(self, dense)

    def __rmatmul__(self, dense: Tensor) -> Tensor:
        return dds(dense, self)

    def to_dense(self) -> Tensor:
        """Return the dense matrix [M, N]. Differentiable."""
        dense = reference.to_dense(self.data, self.topology)
        return dense.mT if self.transposed else dense


def from_dense(dense: Tensor, topology: Topology) -> BlockSparse:
    """Return the blocks of a dense matrix [M, N] that a topology has. Differentiable.

    Raises ConfigError if the shapes differ.
    """
    if tuple(dense.shape) != topology.shape:
        raise ConfigError(
            f"dense is {list(dense.shape)}, but the topology is one of {list(topology.shape)}"
        )
    return BlockSparse(reference.from_dense(dense, topology), topology)


def from_nonzero(dense: Tensor, block: int) -> BlockSparse:
    """Return the blocks of a dense matrix [M, N] that are not all zero. Syncs with the host.

    Raises ConfigError if `block` does not divide M and N.
    """
    for name, size in zip(("M", "N"), dense.shape):
        if size % block:
            raise ConfigError(f"{name} is {size}, which is not a multiple of the block, {block}")
    blocks = dense.unflatten(1, (-1, block)).unflatten(0, (-1, block))
    return from_dense(dense, topology_of_mask((blocks != 0).any(3).any(1), block))


def sdd(left: Tensor, right: Tensor, topology: Topology) -> BlockSparse:
    """Return the blocks of left [M, K] @ right [K, N] that a topology has (sparse = dense @ dense).

    Operands may have any strides, so pass ``left.T`` for a transpose. `left` may also be
    [G, M / G, K], G matrices one below the other, and `right` [G, K, N / G], G matrices side by
    side. Raises ConfigError for shapes or dtypes that do not fit.
    """
    shape = (_rows(left), _rows(right.mT))
    if shape != topology.shape or left.shape[-1] != right.shape[-2]:
        raise ConfigError(
            f"left is {list(left.shape)} and right {list(right.shape)}, "
            f"but the topology is one of {list(topology.shape)}"
        )
    _check_dtypes(left, right)
    _check_groups(left, topology.block)
    _check_groups(right.mT, topology.block)
    size = [topology.block, topology.rows, topology.columns]
    data = sdd_op(left, right, topology.tensors(), size)
    return BlockSparse(data, topology)


def dsd(sparse: BlockSparse, dense: Tensor) -> Tensor:
    """Return sparse [M, K] @ dense [K, N] as [M, N] (dense = sparse @ dense).

    `dense` may have any strides, and may be [G, K / G, N], G matrices one below the other. Raises
    ConfigError for shapes or dtypes that do not fit.
    """
    return _times(sparse, dense, columns_first=False)


def dds(dense: Tensor, sparse: BlockSparse) -> Tensor:
    """Return dense [M, K] @ sparse [K, N] as [M, N] (dense = dense @ sparse).

    `dense` may have any strides, and may be [G, M, K / G], G matrices side by side. Raises
    ConfigError for shapes or dtypes that do not fit.
    """
    return _times(sparse.T, dense.mT, columns_first=True).mT


def _times(sparse: BlockSparse, dense: Tensor, columns_first: bool) -> Tensor:
    topology = sparse.topology
    if sparse.shape[1] != _rows(dense):
        raise ConfigError(
            f"the sparse matrix is {list(sparse.shape)} and the dense one {list(dense.shape)}"
            f"{', both transposed' if columns_first else ''}; they cannot be multiplied"
        )
    _check_dtypes(sparse.data, dense)
    _check_groups(dense, topology.block)
    size = [topology.block, topology.rows, topology.columns]
    return dsd_op(sparse.data, dense, topology.tensors(), size, sparse.transposed, 0, columns_first)


def _rows(dense: Tensor) -> int:
    """Return the rows of a matrix [M, N], or of groups [G, M / G, N]."""
    return dense.shape[0] * dense.shape[1] if dense.dim() == 3 else dense.shape[0]


def _check_dtypes(first: Tensor, second: Tensor) -> None:
    if first.dtype != second.dtype:
        raise ConfigError(f"one operand is {first.dtype} and the other {second.dtype}; cast one")
    if first.is_cuda and first.dtype not in TYPES:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in TYPES)
        raise ConfigError(f"operands are {first.dtype}; block-sparse matmuls on a GPU have {known}")


def _check_groups(dense: Tensor, block: int) -> None:
    if dense.dim() == 3 and dense.shape[1] % block:
        raise ConfigError(
            f"a group of an operand is {dense.shape[1]} wide; it must be a multiple of the block, "
            f"{block}"
        )
