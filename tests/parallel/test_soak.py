"""A thousand steps of skewed routing: no rank hangs, and memory does not grow."""

import pytest
from harness.equality import Layout
from harness.soak import soak

from tokenyard.testing import ranks

LAYOUTS = [
    Layout("fsdp", 2, 2, "all_to_all"),
    Layout("fsdp", 2, 2, "all_to_all_tokens", chunks=2),
    Layout("fsdp", 2, 2, "symmetric_memory"),
    Layout("fsdp", 2, transfers="copies"),
]


@pytest.mark.full
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_on_cpus(layout):
    check_steady(layout, 1000, "cpu")


@pytest.mark.multigpu
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_on_gpus(layout):
    check_steady(layout, 1000, "cuda")


def check_steady(layout, steps, device):
    """Compare the peak memory after a tenth of the steps with the peak after all of them."""
    results = ranks(2, device).run(soak, layout, steps, device)
    assert results[0].norm == results[1].norm > 0
    for result in results:
        growth = result.late_bytes / result.early_bytes - 1
        print(f"\n{layout} on {device}: {result}, grown by {growth:.2%}")
        assert result.max_load >= 8
        assert growth <= 0.01
