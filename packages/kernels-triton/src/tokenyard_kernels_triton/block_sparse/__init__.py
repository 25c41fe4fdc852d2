"""Block-sparse matrices: matmuls that compute and store some blocks of a matrix only.

    topology = topology_of_mask(mask, block=128)   # mask [rows, columns] bool, one entry a block
    sparse = sdd(x, w, topology)                   # the blocks of x @ w
    y = sparse @ dense                             # DSD
    z = dense.T @ sparse                           # DDS

The names are those of MegaBlocks' stk (Gale et al. 2022, arXiv 2211.15841): S and D say whether the
output, the left and the right operand are sparse or dense.

On a GPU the matmuls are Triton kernels. On a CPU they are those of `reference`: plain torch,
block by block. With ``TRITON_INTERPRET=1`` they are the kernels in Triton's interpreter.
"""

from tokenyard_kernels_triton.block_sparse._matrix import (
    BlockSparse,
    dds,
    dsd,
    from_dense,
    from_nonzero,
    sdd,
)
from tokenyard_kernels_triton.block_sparse._topology import (
    Topology,
    topology_of_experts,
    topology_of_indices,
    topology_of_mask,
)

__all__ = [
    "BlockSparse",
    "Topology",
    "dds",
    "dsd",
    "from_dense",
    "from_nonzero",
    "sdd",
    "topology_of_experts",
    "topology_of_indices",
    "topology_of_mask",
]
