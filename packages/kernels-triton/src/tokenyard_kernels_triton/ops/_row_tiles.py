"""The rows of a plan, and the tile lists that the matmuls walk over."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from tokenyard_kernels_triton._device import ceil_div, power_of_two
from tokenyard_kernels_triton.kernels import _schedule
from tokenyard_kernels_triton.launching import launch


@dataclass
class RowTiles:
    """The rows of a plan and their tile lists; each tile size's list is built once."""

    offsets: Tensor  # [E + 1]
    rows: int  # R
    _lists: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    by_rows: Tensor | None = None  # [E] int32: experts, those with most rows first

    @property
    def num_experts(self) -> int:
        """E."""
        return self.offsets.shape[0] - 1

    @property
    def live(self) -> Tensor:
        """[1]: the number of rows before the tail."""
        return self.offsets[-1:]

    def bound(self, tile: int) -> int:
        """Return the largest possible number of tiles of `tile` rows."""
        return ceil_div(self.rows, tile) + self.num_experts

    def tile_list(self, tile: int, group: int) -> Tensor:
        """Return the list of tiles of `tile` rows, at most `group` in a group.

        ``kernels._schedule`` describes the format.
        """
        if (tile, group) not in self._lists:
            tiles = self.offsets.new_empty(2 + _schedule.FIELDS.value * self.bound(tile))
            self.by_rows = self.offsets.new_empty(self.num_experts)
            launch(_schedule.list_tiles, (self.num_experts,))(
                self.offsets,
                tiles,
                self.by_rows,
                self.num_experts,
                TILE=tile,
                GROUP=group,
                EXPERTS=power_of_two(self.num_experts),
                CHUNK=128,
                num_warps=1,
            )
            self._lists[tile, group] = tiles
        return self._lists[tile, group]

    def counter(self) -> Tensor:
        """Return the counter [1] int32 of a tile list. It is zero between matmuls."""
        self.largest_first()
        return next(iter(self._lists.values()))[1:2]

    def largest_first(self) -> Tensor:
        """Return the experts [E] int32, those with most rows first."""
        if self.by_rows is None:
            self.tile_list(128, 32)
        assert self.by_rows is not None
        return self.by_rows
