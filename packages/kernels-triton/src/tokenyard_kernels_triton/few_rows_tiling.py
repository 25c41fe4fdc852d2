"""The tile sizes of the matmuls for few rows an expert, and up to how many rows they are used."""

from __future__ import annotations

from dataclasses import dataclass

MOST_FEW_ROWS = 32
"""The mean number of rows an expert up to which matmuls for few rows are faster than others."""

MOST_OF_GRADIENT = 8
"""The same, for weight gradients."""


@dataclass(frozen=True)
class FewRowsTiling:
    """The tile of a matmul: `columns` of the weights by `rows` of an expert."""

    rows: int
    columns: int  # in a gated up matmul, of gate and up together
    depth: int  # of a slice of the reduction dimension
    warps: int
    stages: int  # slices loaded ahead

    def options(self) -> dict[str, int]:
        """Return the arguments of every matmul's launch."""
        return {
            "ROWS": self.rows,
            "DEPTH": self.depth,
            "num_warps": self.warps,
            "num_stages": self.stages,
        }


_TILINGS = (  # by the highest mean of rows an expert, for which they were measured on an H200
    (8, FewRowsTiling(16, 64, 128, 4, 3)),
    (16, FewRowsTiling(32, 64, 128, 4, 3)),
    (MOST_FEW_ROWS, FewRowsTiling(64, 128, 64, 4, 3)),
)

GRADIENT_TILING = FewRowsTiling(64, 128, 16, 4, 3)
"""The tile of weight gradients: `rows` by `columns` of a weight."""


def few_rows_tiling(rows: int, num_experts: int) -> FewRowsTiling:
    """Return the tile of matmuls over `rows` rows of all experts."""
    mean = rows / num_experts
    return next((tiling for most, tiling in _TILINGS if mean <= most), _TILINGS[-1][1])
