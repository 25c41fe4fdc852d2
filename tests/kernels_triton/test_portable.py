"""The matmuls of `triton`: programs and tiles; in the interpreter on a CPU."""

import pytest
import torch

from tokenyard.experts import rows_times
from tokenyard.testing._compare import poisoned_memory
from tokenyard.tolerance import relative_error

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
COUNTS = [5, 0, 70, 33]  # rows of each expert
TAIL = 150  # rows that a bound allows and that no expert has


@pytest.mark.parametrize("rounds", [1, 32])
def test_programs_walk_over_all_tiles_of_the_rows_that_exist(rounds, monkeypatch):
    """With one for each multiprocessor, each computes several tiles; with 32, most have none."""
    from tokenyard_kernels_triton.ops import _portable
    from tokenyard_kernels_triton.ops._row_tiles import RowTiles

    torch.manual_seed(0)
    monkeypatch.setattr(_portable, "_ROUNDS", rounds)
    monkeypatch.setattr(_portable, "processors", lambda device: 1)
    offsets = torch.tensor([0, *COUNTS], device=DEVICE).cumsum(0).int()
    kept = sum(COUNTS)
    x = torch.randn(kept + TAIL, 48, device=DEVICE)
    x[kept:] = torch.nan
    weight = torch.randn(len(COUNTS), 200, 48, device=DEVICE)
    tiles = RowTiles(offsets, len(x))
    with poisoned_memory():
        y = _portable.times_weight(x, weight, None, tiles, True, "down")
        z, a = _portable.up_and_activate(x, weight, None, tiles, "relu")
    want = rows_times(x[:kept].double(), weight.mT.double(), offsets)
    assert relative_error(y[:kept], want) < 1e-6
    assert relative_error(z[:kept], want) < 1e-6
    assert torch.equal(a[:kept], z[:kept].relu())
